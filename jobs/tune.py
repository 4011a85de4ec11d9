"""Search the method's settings on the cluster that runs this job: ``raygkd tune`` as a Ray job.

ray job submit --working-dir . -- python jobs/tune.py --dataset digits
"""

import sys

from raygkd.cli.main import main

if __name__ == "__main__":
    sys.argv.insert(1, "tune")
    main()
