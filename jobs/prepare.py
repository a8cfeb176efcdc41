"""`raybert prepare` as a job: ray job submit --working-dir . -- python jobs/prepare.py ARGUMENTS"""

import sys

from raybert.cli import run_app

if __name__ == "__main__":
    sys.exit(run_app(["prepare", *sys.argv[1:]]))
