"""`raybert doctor` as a job: ray job submit --working-dir . -- python jobs/doctor.py ARGUMENTS"""

import sys

from raybert.cli import run_app

if __name__ == "__main__":
    sys.exit(run_app(["doctor", *sys.argv[1:]]))
