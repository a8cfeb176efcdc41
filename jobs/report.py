"""`raybert report` as a job: ray job submit --working-dir . -- python jobs/report.py ARGUMENTS"""

import sys

from raybert.cli import run_app

if __name__ == "__main__":
    sys.exit(run_app(["report", *sys.argv[1:]]))
