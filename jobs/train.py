"""Distil one student on the cluster that runs this job: ``raygkd train`` as a Ray job.

ray job submit --working-dir . -- python jobs/train.py --dataset digits
"""

import sys

from raygkd.cli.main import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()
