from __future__ import annotations

import subprocess
import sys

OPTIONAL = ("pyarrow", "sklearn", "matplotlib", "rich", "ray", "mlflow", "yaml", "click")


def test_core_of_data_needs_torch_numpy_and_pillow_only():
    code = f"import sys, raygkd.data; print([m for m in {OPTIONAL} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.stdout, result.returncode) == ("[]\n", 0), result.stderr
