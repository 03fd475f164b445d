"""Marks for tests that need newer versions than the oldest that the library supports."""

import pytest
import torch
import transformers


def since_torch(*version):
    return pytest.mark.skipif(torch.__version__ < version, reason=f"needs torch {'.'.join(map(str, version))}")


since_transformers_5 = pytest.mark.skipif(transformers.__version__ < "5", reason="needs transformers 5")
