"""Reading a cache: the types on the disk are kept, files are memory-mapped, and checksums computed once per machine."""

import json
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import caching
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader

import kdloss
import kdloss.cache
from kdloss.cache import _files, _intact


@pytest.fixture(autouse=True)
def marks(monkeypatch, tmp_path_factory):
    """A new folder for the marks of files with the right checksum; even files written just now are marked."""
    folder = tmp_path_factory.mktemp("marks")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(_intact, "_SETTLED", -1.0)
    return folder


@pytest.fixture
def checksummed(monkeypatch):
    """The names of the files whose checksum was computed."""
    names, sha256 = [], _files.sha256
    monkeypatch.setattr(_files, "sha256", lambda file: names.append(file.name) or sha256(file))
    return names


class Ramp(nn.Module):
    """A teacher that prefers the last classes, except one that depends on the token."""

    def __init__(self, vocabulary):
        super().__init__()
        self.values = nn.Parameter(torch.arange(vocabulary) * 0.01)

    def forward(self, input_ids, attention_mask):
        return self.values - 0.5 * (torch.arange(len(self.values)) == len(self.values) - 1 - input_ids.unsqueeze(-1))


def _no_folder(*args):
    raise FileNotFoundError("No usable temporary directory found")


def opened(folder, **settings):
    return kdloss.cache.open(folder, tokenizer=caching.tokenizer(), **settings)


# -- batches --


@pytest.mark.parametrize(
    ("vocabulary", "dtype"),
    [
        (255, torch.uint8),
        (256, torch.uint16),  # all 8-bit numbers are classes, so an empty slot needs a wider type
        (257, torch.uint16),
        (65536, torch.int32),
        (65537, torch.int32),
    ],
)
def test_a_batch_has_the_types_on_the_disk_with_one_number_for_empty_slots(tmp_path, vocabulary, dtype):
    caching.write(tmp_path, Ramp(vocabulary))
    lengths = [len(ids) for ids in caching.tokens()]
    x = opened(tmp_path)[["example 9", "example 2", "example 4"]]
    assert (x.indices.dtype, x.log_probs.dtype, x.log_rest.dtype) == (dtype, torch.float16, torch.float16)
    for row, i in enumerate((9, 2, 4)):
        n, shard = lengths[i], i // 4
        at = slice(sum(lengths[4 * shard : i]), sum(lengths[4 * shard : i + 1]))
        kept = load_file(tmp_path / f"shard-0000{shard}.safetensors")
        assert torch.equal(x.ids()[row, :n], kept["indices"][at].long())
        assert torch.equal(x.log_probs[row, :n], kept["log_probs"][at])
        assert torch.equal(x.log_rest[row, :n], kept["log_rest"][at])
        assert x.empty()[row].tolist() == [False] * n + [True] * (x.shape[1] - n)
        assert x.ids()[row, 0, 0] >= vocabulary - 2
    student = torch.randn(*x.shape[:2], vocabulary, generator=torch.Generator().manual_seed(0)).requires_grad_()
    wide = kdloss.TopKLogits(x.ids(), x.log_probs.float(), "bucket", 2.0, x.log_rest.float(), vocabulary)
    losses = [kdloss.VanillaKD(2.0, 0.0)(student, kept) for kept in (x, wide)]
    assert losses[0].item() == losses[1].item()
    assert torch.equal(*(torch.autograd.grad(loss, student)[0] for loss in losses))


def test_a_batch_is_a_copy_and_changing_it_changes_no_file(tmp_path):
    cache = opened(caching.write(tmp_path))
    one, before = cache[["example 1"]], caching.contents(tmp_path)
    again = cache[["example 1"]]
    one.log_probs.fill_(-1.0)
    one.indices.zero_()
    assert torch.equal(cache[["example 1"]].log_probs, again.log_probs)
    assert torch.equal(cache[["example 1"]].indices, again.indices)
    assert caching.contents(tmp_path) == before


def test_a_mask_with_holes_gives_the_positions_of_the_tokens(tmp_path):
    cache = opened(caching.write(tmp_path))
    n, m = (len(caching.tokens()[i]) for i in (0, 1))
    mask = torch.zeros(2, n + m + 1, dtype=torch.int64)
    mask[0, : 2 * n : 2] = 1
    mask[1, 1 : m + 1] = 1
    x, plain = cache.batch(["example 0", "example 1"], attention_mask=mask), cache[["example 0", "example 1"]]
    for part in ("indices", "log_probs", "log_rest"):
        assert torch.equal(getattr(x, part)[0, : 2 * n : 2], getattr(plain, part)[0, :n])
        assert torch.equal(getattr(x, part)[1, 1 : m + 1], getattr(plain, part)[1, :m])
    assert torch.equal(x.empty(), mask == 0)


def test_numbers_from_a_cache_are_not_checked_in_a_step(tmp_path, monkeypatch):
    cache = opened(caching.write(tmp_path))
    monkeypatch.setattr(kdloss.targets.looks, "look", None)
    monkeypatch.setattr(kdloss.targets.looks, "in_range", None)
    x = cache[["example 0", "example 1"]]
    assert kdloss.VanillaKD(2.0, 0.0)(torch.randn(*x.shape[:2], caching.VOCAB), x).isfinite()


def test_a_cache_that_was_sent_to_another_process_reads_the_same_batches(tmp_path):
    cache = opened(caching.write(tmp_path), tail="renormalise")
    again = pickle.loads(pickle.dumps(cache))
    assert (len(again), "example 3" in again, again.tail, again.folder) == (10, True, "renormalise", tmp_path)
    batches = [["example 7", "example 2"], ["example 0"]]
    for x, ids in zip(
        DataLoader(batches, batch_size=None, num_workers=1, collate_fn=again.batch), batches, strict=True
    ):
        for part in ("indices", "log_probs", "log_rest"):
            assert torch.equal(getattr(x, part), getattr(cache[ids], part))


# -- checksums --


def test_a_checksum_is_computed_once_per_machine(tmp_path, checksummed):
    caching.write(tmp_path)
    checksummed.clear()
    opened(tmp_path)[["example 0", "example 9"]]
    opened(tmp_path)[["example 0", "example 9"]]
    pickle.loads(pickle.dumps(opened(tmp_path)))[["example 1"]]
    assert checksummed == ["shard-00000.safetensors", "shard-00002.safetensors"]
    code = (
        "import sys, caching, kdloss.cache\nfrom kdloss.cache import _files; _files.sha256 = lambda file: print(file)\n"
        "kdloss.cache.open(sys.argv[1], tokenizer=caching.tokenizer())[['example 0', 'example 9']]"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": tempfile.gettempdir()}
    output = subprocess.check_output([sys.executable, "-c", code, tmp_path], env=environment, text=True)
    assert output == ""
    opened(tmp_path).verify()  # ignores the marks
    assert checksummed[2:] == [f"shard-0000{i}.safetensors" for i in range(3)]


def test_a_changed_file_is_checked_again_even_with_its_old_size_and_time(tmp_path, checksummed):
    file = caching.write(tmp_path) / "shard-00000.safetensors"
    opened(tmp_path)[["example 0"]]
    then, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(then.st_atime_ns, then.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (then.st_size, then.st_mtime_ns)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"shard-00000.safetensors was cut or altered"):
            opened(tmp_path)[["example 0"]]


def test_files_are_checked_again_against_a_changed_manifest(tmp_path):
    caching.write(tmp_path)
    opened(tmp_path)[["example 0"]]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["shards"]["shard-00000"]["sha256"] = "0" * 64
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"shard-00000.safetensors was cut or altered"):
        opened(tmp_path)[["example 0"]]


def test_a_file_that_was_written_just_now_is_not_marked_as_checked(tmp_path, checksummed, monkeypatch, marks):
    monkeypatch.setattr(_intact, "_SETTLED", 60.0)
    caching.write(tmp_path)
    checksummed.clear()
    for _ in range(2):
        opened(tmp_path)[["example 0"]]
    assert checksummed == ["shard-00000.safetensors"] * 2
    assert not list(marks.iterdir())


def test_without_a_folder_for_marks_every_reader_computes_the_checksum(tmp_path, checksummed, monkeypatch):
    caching.write(tmp_path / "cache")
    (tmp_path / "file").write_text("no folder")
    for place in (str(tmp_path / "file"), str(tmp_path / "absent" / "folder"), None):
        monkeypatch.setattr(tempfile, "tempdir", place)
        if place is None:
            monkeypatch.setattr(tempfile, "_get_default_tempdir", _no_folder)
        checksummed.clear()
        for _ in range(2):
            opened(tmp_path / "cache")[["example 0"]]
        assert checksummed == ["shard-00000.safetensors"] * 2


def test_marks_of_another_user_are_ignored(tmp_path, checksummed, monkeypatch):
    caching.write(tmp_path)
    monkeypatch.setattr(_intact, "_user", lambda: 2**31 - 5)  # so marks that this test makes belong to another user
    checksummed.clear()
    for _ in range(2):
        opened(tmp_path)[["example 0"]]
    assert checksummed == ["shard-00000.safetensors"] * 2


def test_a_checksum_is_computed_again_after_a_reboot(tmp_path, checksummed, monkeypatch):
    caching.write(tmp_path)
    opened(tmp_path)[["example 0"]]
    monkeypatch.setattr(_intact, "_machine", lambda: "another")
    checksummed.clear()
    opened(tmp_path)[["example 0"]]
    assert checksummed == ["shard-00000.safetensors"]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists mapped files in /proc/self/maps")
def test_shards_are_memory_mapped_and_no_file_stays_open(tmp_path):
    """Some systems allow a process a thousand open files."""
    cache = opened(caching.write(tmp_path, data=caching.dataset(40), shard_size=1))
    before = len(os.listdir("/proc/self/fd"))
    cache[[f"example {i}" for i in range(40)]]
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    assert str(tmp_path / "shard-00039.safetensors") in Path("/proc/self/maps").read_text()
