"""Score models on the cluster that runs this job: ``raygkd evaluate`` as a Ray job.

ray job submit --working-dir . -- python jobs/evaluate.py /shared/model.pt --dataset digits
"""

import sys

from raygkd.cli.main import main

if __name__ == "__main__":
    sys.argv.insert(1, "evaluate")
    main()
