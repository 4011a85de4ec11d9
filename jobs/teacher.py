"""Train a teacher on the cluster that runs this job: ``raygkd teacher`` as a Ray job.

ray job submit --working-dir . -- python jobs/teacher.py --dataset digits
"""

import sys

from raygkd.cli.main import main

if __name__ == "__main__":
    sys.argv.insert(1, "teacher")
    main()
