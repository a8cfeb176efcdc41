"""`ray job submit --working-dir . -- python jobs/prepare.py --input URI --output URI --seq-len N`"""

import sys

from raybert.cli import app

if __name__ == "__main__":
    app(["prepare", *sys.argv[1:]])
