"""Compare methods on the cluster that runs this job: ``raygkd compare`` as a Ray job.

ray job submit --working-dir . -- python jobs/compare.py --dataset digits
"""

import sys

from raygkd.cli.main import main

if __name__ == "__main__":
    sys.argv.insert(1, "compare")
    main()
