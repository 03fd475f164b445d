"""Functions that need an extra name it in their error, and everything else works without extras."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Runs in a separate process that finds only the packages that `pip install kdloss` installs.
HIDING = """
import json, sys
from importlib.machinery import PathFinder

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {hidden} else super().find_spec(name, path, target)

sys.meta_path[:] = [Hiding if finder is PathFinder else finder for finder in sys.meta_path]
import torch, kdloss

def cache():
    kdloss.cache

def hf():
    kdloss.hf

def emd():
    kdloss.layers.pair_by_emd({{}}, {{}}, {{(0, 0): torch.tensor(1.0)}})

def heat_map():
    kdloss.analysis.CKAMatrix(torch.ones(2, 2)).heatmap("map.png")

def picture():
    kdloss.analysis.Curve().draw("curve.png")

said = {{}}
for needs in (cache, hf, emd, heat_map, picture):
    try:
        needs()
    except ImportError as error:
        said[needs.__name__] = str(error)
loss = kdloss.VanillaKD()(torch.zeros(4, 3), torch.ones(4, 3), torch.tensor([0, 1, 2, 0]))
print(json.dumps([said, loss.isfinite().item()]))
"""
HIDDEN = ["transformers", "datasets", "accelerate", "safetensors", "tqdm", "scipy", "matplotlib", "numpy", "peft"]


@pytest.fixture(scope="module")
def results():
    code = HIDING.format(hidden=set(HIDDEN))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("cache", "kdloss.cache needs numpy; write: pip install 'kdloss[hf]'"),
        ("hf", "kdloss.hf needs safetensors; write: pip install 'kdloss[hf]'"),
        ("emd", "pair_by_emd needs scipy; write: pip install 'kdloss[emd]'"),
        ("heat_map", "a heat map needs matplotlib; write: pip install 'kdloss[plot]'"),
        ("picture", "a picture of a curve needs matplotlib; write: pip install 'kdloss[plot]'"),
    ],
)
def test_functions_that_need_an_extra_name_it(results, what, words):
    assert results[0][what] == words


def test_cache_and_hf_are_imported_when_they_are_first_used():
    code = (
        "import sys, kdloss; assert 'transformers' not in sys.modules; assert not hasattr(kdloss, 'other'); "
        "kdloss.cache.open; kdloss.hf.Distilling; assert 'transformers' in sys.modules"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_criterion_needs_no_extra(results):
    assert results[1] is True


def test_a_broken_module_of_ours_is_not_taken_for_a_missing_extra():
    from kdloss._extras import extra

    with pytest.raises(ModuleNotFoundError, match=r"kdloss\.no_such_module"), extra("hf", "kdloss.cache"):
        import kdloss.no_such_module  # noqa: F401
