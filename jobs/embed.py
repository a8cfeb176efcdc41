"""`raybert embed` as a job: ray job submit --working-dir . -- python jobs/embed.py ARGUMENTS"""

import sys

from raybert.cli import run_app

if __name__ == "__main__":
    sys.exit(run_app(["embed", *sys.argv[1:]]))
