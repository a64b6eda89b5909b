"""A store returns what was written, and refuses to open when any of it has changed."""

import json
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_hbp.data import store as store_module
from megatron_hbp.data.manifest import BULK_FILES, FORMAT_VERSION, INDEX_FILES, MANIFEST_FILE
from megatron_hbp.data.prepare import prepare_store
from megatron_hbp.data.store import TokenStore
from megatron_hbp.data.tokenizer import ChatTokenizer
from megatron_hbp.data.writer import StoreWriter
from megatron_hbp.errors import DataError
from tests.unit.data.conftest import GOOD, line

CHATS = GOOD + line("Hello", "Paris. 🙂", "Thank you", "bye!", system="Be brief.") + line("Hello", "bye! " * 50)


@pytest.fixture(scope="module")
def original(tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    (folder / "chats.jsonl").write_bytes(CHATS)
    return prepare_store(inputs=[folder / "chats.jsonl"], tokenizer=tokenizer, out=folder / "store").path


@pytest.fixture
def copy(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "store"))


def test_round_trip(tokenizer, tmp_path):
    rng = np.random.default_rng(0)
    lengths = [2, 5000, 1, 77]
    tokens = [rng.integers(0, 2**31 - 1, n, dtype=np.int32) for n in lengths]
    masks = [rng.integers(0, 2, n, dtype=np.uint8) for n in lengths]
    with StoreWriter(tmp_path / "store") as writer:
        for sample in zip(tokens, masks, strict=True):
            writer.add(*sample)
        writer.finish(tokenizer=tokenizer.info, sources=[])
    store = TokenStore.open(tmp_path / "store")
    assert store.num_samples == len(store) == 4
    assert store.lengths.tolist() == lengths and store.lengths.dtype == np.int64
    assert store.loss_tokens.tolist() == [int(mask.sum()) for mask in masks] and store.loss_tokens.dtype == np.int64
    for index in range(4):
        read_tokens, read_mask = store.sample(index)
        assert read_tokens.dtype == np.int64 and np.array_equal(read_tokens, tokens[index])
        assert read_mask.dtype == np.uint8 and np.array_equal(read_mask, masks[index])
    store.verify()


def test_samples_are_the_chats_in_order(tokenizer, original):
    store = TokenStore.open(original)
    generated = [tokenizer.backend.decode(tokens[mask == 1]) for tokens, mask in map(store.sample, range(3))]
    assert generated == ["Paris.<|end|>", "Paris. 🙂<|end|>bye!<|end|>", "bye! " * 50 + "<|end|>"]
    assert store.manifest.tokenizer == tokenizer.info


def test_samples_are_copies(original):
    store = TokenStore.open(original)
    tokens, mask = store.sample(1)
    tokens[:], mask[:] = -1, 9
    assert store.sample(1)[0].min() >= 0 and store.sample(1)[1].max() == 1


@pytest.mark.parametrize("index", [-1, 3])
def test_an_index_out_of_range(original, index):
    with pytest.raises(IndexError, match=f"sample {index} of 3"):
        TokenStore.open(original).sample(index)


def test_a_store_can_be_pickled(original):
    store = TokenStore.open(original)
    store.sample(0)
    unpickled = pickle.loads(pickle.dumps(store))
    assert np.array_equal(unpickled.sample(2)[0], store.sample(2)[0])


def test_the_fingerprint_depends_on_content_only(tokenizer, original, tmp_path):
    def fingerprint(name: str, content: bytes = CHATS, tokenizer: ChatTokenizer = tokenizer) -> str:
        (tmp_path / f"{name}.jsonl").write_bytes(content)
        store = prepare_store(inputs=[tmp_path / f"{name}.jsonl"], tokenizer=tokenizer, out=tmp_path / name)
        return store.fingerprint

    same = fingerprint("same")
    assert same == TokenStore.open(original).fingerprint and len(same) == 64 and int(same, 16)
    other_tokens = fingerprint("tokens", CHATS.replace(b"Hello", b"Hullo"))
    end_outside = tokenizer.template.replace(
        " + '<|end|>' }}{% endgeneration %}", " }}{% endgeneration %}{{ '<|end|>' }}"
    )
    other_mask = fingerprint("mask", tokenizer=replace(tokenizer, template=end_outside))
    assert len({same, other_tokens, other_mask}) == 3


@pytest.mark.parametrize("name", [*BULK_FILES, *INDEX_FILES, MANIFEST_FILE])
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(DataError, match=rf"/{name}: "):
        TokenStore.open(copy)


@pytest.mark.parametrize("name", [*BULK_FILES, *INDEX_FILES, MANIFEST_FILE])
def test_a_truncated_file_is_named(copy, name):
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[:-3])
    with pytest.raises(DataError, match=rf"/{name}: .*hbp prepare"):
        TokenStore.open(copy)


@pytest.mark.parametrize("name", [*BULK_FILES, *INDEX_FILES])
def test_one_flipped_bit_is_found(copy, name):
    """By `verify` in the bulk files, by every open in the others."""
    content = bytearray((copy / name).read_bytes())
    for position in np.random.default_rng(0).integers(0, len(content), 20):
        content[position] ^= 1
        (copy / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"/{name}: token store damaged: SHA-256"):
            TokenStore.open(copy).verify()
        content[position] ^= 1


def test_the_verify_command_reads_every_byte_once(copy, hbp, monkeypatch):
    bytes_read: list[int] = []
    monkeypatch.setattr("megatron_hbp.data.manifest.BLOCK_BYTES", 100)
    TokenStore.open(copy).verify(on_progress=bytes_read.append)
    assert (
        sum(bytes_read) == TokenStore.open(copy).bulk_bytes == sum((copy / name).stat().st_size for name in BULK_FILES)
    )
    assert len(bytes_read) > len(BULK_FILES) and max(bytes_read) == 100
    result = hbp("store", "verify", copy)
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(f"{copy}: 3 samples, all files as written")


@pytest.mark.parametrize("name", [*BULK_FILES, *INDEX_FILES])
def test_the_verify_command_names_the_damaged_file(copy, hbp, name):
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    result = hbp("store", "verify", copy)
    assert (result.code, result.out, result.err.count("\n")) == (65, "", 1)
    assert result.err.startswith(f"hbp: {copy / name}: token store damaged: SHA-256 is ")


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_samples", 4), ("num_tokens", 1), ("num_loss_tokens", 1), ("fingerprint", "0" * 64),
     ("format_version", "one"), ("files", {}), ("tokenizer", None), ("sources", 7)],
)  # fmt: skip
def test_a_manifest_that_does_not_match_is_refused(copy, field, value):
    manifest = json.loads((copy / MANIFEST_FILE).read_text())
    (copy / MANIFEST_FILE).write_text(json.dumps(manifest | {field: value}))
    with pytest.raises(DataError, match=rf"/{MANIFEST_FILE}: "):
        TokenStore.open(copy)


@pytest.mark.parametrize(
    ("store_version", "release_version", "advice"),
    [(1, 2, "; run `hbp prepare` again"), (2, 1, "; update megatron_hbp, or run `hbp prepare` again")],
    ids=["older store", "newer store"],
)
def test_a_store_of_another_version_is_refused_in_one_line(
    copy, hbp, monkeypatch, store_version, release_version, advice
):
    """Also when nothing else of its manifest is understood."""
    (copy / MANIFEST_FILE).write_text(json.dumps({"format_version": store_version, "unknown": 7}))
    monkeypatch.setattr("megatron_hbp.data.manifest.FORMAT_VERSION", release_version)
    result = hbp("store", "verify", copy)
    assert (result.code, result.err.count("\n")) == (65, 1)
    assert f"format {store_version}, but this megatron_hbp reads format {release_version}{advice}" in result.err


def test_version_1_is_this_layout(original):
    """Whoever changes the layout raises FORMAT_VERSION, by the rule in manifest.py, and then this test."""
    manifest = json.loads((original / MANIFEST_FILE).read_text())
    assert manifest["format_version"] == FORMAT_VERSION == 1
    assert set(manifest) == {
        "files", "fingerprint", "format_version", "max_length", "num_loss_tokens", "num_samples", "num_tokens",
        "sources", "tokenizer",
    }  # fmt: skip
    tokenizer_fields = {"chat_template_sha256", "eos_id", "name", "pad_id", "sha256", "vocab_size"}
    assert set(manifest["tokenizer"]) == tokenizer_fields
    assert set(manifest["sources"][0]) == {"bytes", "num_lines", "num_samples", "path", "sha256", "skipped"}
    files = {"tokens.bin", "tokens.idx", "loss_mask.bin", "loss_mask.idx", "lengths.npy", "loss_tokens.npy"}
    assert set(manifest["files"]) == files == {path.name for path in original.iterdir()} - {MANIFEST_FILE}
    num_tokens = manifest["num_tokens"]
    assert np.fromfile(original / "tokens.bin", np.int32).size == num_tokens
    assert np.fromfile(original / "loss_mask.bin", np.uint8).size == num_tokens
    assert np.load(original / "lengths.npy").dtype == np.load(original / "loss_tokens.npy").dtype == np.int64


def test_a_path_that_is_not_a_store(tmp_path):
    with pytest.raises(DataError, match="no such token store"):
        TokenStore.open(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"manifest\.json: cannot be read"):
        TokenStore.open(tmp_path)


def test_lengths_load_without_torch_or_megatron(original):
    """`hbp plan` opens a store for its lengths only and must not wait seconds for imports that it does not use."""
    code = (
        "import sys; from megatron_hbp.data.store import TokenStore;"
        f"print(TokenStore.open({str(original)!r}).lengths.sum());"
        "sys.exit(bool({'torch', 'megatron', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == TokenStore.open(original).lengths.sum()


def test_reading_prints_nothing(original):
    code = f"from megatron_hbp.data.store import TokenStore; TokenStore.open({str(original)!r}).sample(0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "" and done.stdout == ""


def test_read_ahead_is_requested_in_file_order(original, monkeypatch):
    requested: list[tuple[int, int]] = []
    monkeypatch.setattr("os.posix_fadvise", lambda file, start, size, advice: requested.append((start, size)))
    store = TokenStore.open(original)
    n = store.lengths
    everything = store.will_need(np.array([2, 0]))  # sample 1 lies between them and is read too
    assert requested == [(0, 4 * int(n[:3].sum())), (0, int(n[:3].sum()))] and everything == 5 * n[:3].sum()
    requested.clear()
    monkeypatch.setattr(store_module, "READ_GAP", 0)
    store.will_need(np.array([2, 0]))
    assert requested == [(0, 4 * n[0]), (4 * n[:2].sum(), 4 * n[2]), (0, n[0]), (n[:2].sum(), n[2])]
