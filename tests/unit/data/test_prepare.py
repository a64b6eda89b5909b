"""`hbp prepare` as a user sees it: exit codes, file:line, counts, and no store after a failure."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_hbp.data.prepare import prepare_store
from megatron_hbp.data.store import TokenStore
from megatron_hbp.errors import DiskError
from tests.unit.data.conftest import GOOD, line

BAD_LINES = {
    "bad JSON": b'{"messages": [{"role": "user", "cont\n',
    "bad UTF-8": GOOD.replace(b"Paris", b"Par\xffs"),
    "NUL byte": GOOD.replace(b"Paris", b"Par\x00s"),
    "no list of messages": b'["not", "an", "object"]\n',
    "wrong role": GOOD.replace(b'"user"', b'"human"'),
    "content is not text": GOOD.replace(b'"Paris."', b"7"),
    "empty content": line("Hello", " "),
    "no assistant turn": line("Hello"),
    "longer than --max-length": line("Hello", "Paris. " * 200),
}
MORE_BAD_LINES = {
    "no messages": (b'{"text": "hello"}\n', "no list of messages"),
    "empty messages": (b'{"messages": []}\n', "no list of messages"),
    "message is text": (b'{"messages": ["hello"]}\n', "no list of messages"),
    "role is a list": (GOOD.replace(b'"user"', b'["user"]'), "wrong role"),
    "no content": (b'{"messages": [{"role": "assistant"}]}\n', "content is not text"),
    "content parts": (GOOD.replace(b'"Paris."', b'[{"type": "text"}]'), "content is not text"),
    "unclosed brackets": (b"[" * 100_000 + b"\n", "bad JSON"),
    "huge number": (b'{"messages": ' + b"9" * 10_000 + b"}\n", "bad JSON"),
    "escaped NUL": (GOOD.replace(b"Paris", b"Par\\u0000s"), "NUL byte"),
    "lone surrogate": (GOOD.replace(b"Paris", b"Par\\ud800s"), "bad UTF-8"),
    "tools is text": (GOOD.replace(b'{"messages"', b'{"tools": "all", "messages"'), "no list of messages"),
}


@pytest.fixture
def prepare(hbp, tokenizer_folder, tmp_path):
    def run(content: bytes, *options: object):
        chats = tmp_path / "chats.jsonl"
        chats.write_bytes(content)
        return hbp("prepare", "--input", chats, "--tokenizer", tokenizer_folder, "--out", tmp_path / "store", *options)

    return run


def leftovers(tmp_path: Path) -> set[str]:
    return {path.name for path in tmp_path.iterdir()} - {"chats.jsonl"}


@pytest.mark.parametrize(
    ("bad", "fault"), [(bad, fault) for fault, bad in BAD_LINES.items()] + list(MORE_BAD_LINES.values())
)
def test_a_bad_line_ends_in_65_with_file_and_line_and_no_store(prepare, tmp_path, bad, fault):
    result = prepare(GOOD + b"\n" + GOOD + bad + GOOD, "--max-length", 300)
    assert result.code == 65
    assert result.err.startswith(f"hbp: {tmp_path}/chats.jsonl:4: {fault}: ")
    assert result.err.count("\n") == 1 and "--lenient" in result.err
    assert leftovers(tmp_path) == set()


def test_lenient_skips_and_counts_every_kind(prepare, tmp_path):
    content = b"".join(GOOD + bad * (number + 1) for number, bad in enumerate(BAD_LINES.values()))
    result = prepare(content, "--lenient", "--max-length", 300)
    assert result.code == 0, result.err
    store = TokenStore.open(tmp_path / "store")
    assert store.num_samples == len(BAD_LINES)
    [source] = store.manifest.sources
    assert source.skipped == {fault: number + 1 for number, fault in enumerate(BAD_LINES)}
    assert source.num_lines == source.num_samples + sum(source.skipped.values())
    printed = " ".join(result.out.split())
    for number, fault in enumerate(BAD_LINES):
        assert f"skipped: {fault} │ {number + 1} │" in printed


def test_summary_names_counts_and_lengths(prepare, tmp_path):
    result = prepare(GOOD + line("Hello", "Paris. " * 30) + GOOD)
    store = TokenStore.open(tmp_path / "store")
    printed = " ".join(result.out.split())
    assert "samples │ 3 │" in printed
    assert f"tokens │ {store.lengths.sum():,} │" in printed
    assert f"loss tokens │ {store.loss_tokens.sum():,} (" in printed
    assert f"longest sample │ {store.lengths.max():,} tokens │" in printed
    assert f"median sample │ {np.median(store.lengths):,.0f} tokens │" in printed


def test_a_chat_without_generated_tokens_is_refused(prepare, tmp_path):
    template = tmp_path / "never.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}{% generation %}{% endgeneration %}")
    result = prepare(GOOD, "--chat-template", template)
    assert result.code == 65 and "chats.jsonl:1: no token to learn from" in result.err


@pytest.mark.parametrize("content", [b"", b"\n \n"], ids=["empty", "blank lines"])
def test_a_file_without_chats(prepare, content):
    result = prepare(content)
    assert result.code == 65 and "chats.jsonl: no chat to train on" in result.err


def test_lenient_without_a_single_good_chat_counts_what_was_skipped(prepare, tmp_path):
    result = prepare(BAD_LINES["bad JSON"] * 3, "--lenient")
    assert result.code == 65 and "(skipped: 3 bad JSON)" in result.err
    assert leftovers(tmp_path) == set()


def test_a_missing_second_input_is_reported_before_the_first_is_read(prepare, tmp_path):
    result = prepare(BAD_LINES["bad JSON"], "--input", tmp_path / "more.jsonl")
    assert result.code == 65 and f"{tmp_path}/more.jsonl: no such file" in result.err


def test_an_input_that_is_a_directory(prepare, tmp_path):
    result = prepare(GOOD, "--input", tmp_path)
    assert result.code == 65 and f"{tmp_path}: is not a file" in result.err


def test_template_without_generation_block_ends_in_78(prepare, tmp_path):
    template = tmp_path / "plain.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    result = prepare(GOOD, "--chat-template", template)
    assert result.code == 78 and "{% generation %}" in result.err and "--chat-template" in result.err


@pytest.mark.parametrize("length", [0, 1])
def test_a_max_length_below_2_ends_in_78(prepare, length):
    result = prepare(GOOD, "--max-length", length)
    assert result.code == 78 and "--max-length" in result.err


def test_max_length_is_inclusive(prepare, tmp_path):
    assert prepare(GOOD).code == 0
    length = int(TokenStore.open(tmp_path / "store").lengths[0])
    assert prepare(GOOD, "--overwrite", "--max-length", length).code == 0
    assert prepare(GOOD, "--overwrite", "--max-length", length - 1).code == 65


def test_an_existing_store_is_replaced_only_with_overwrite(prepare, tmp_path):
    assert prepare(GOOD).code == 0
    first = TokenStore.open(tmp_path / "store").fingerprint
    refused = prepare(GOOD + GOOD)
    assert refused.code == 78 and "--overwrite" in refused.err
    assert TokenStore.open(tmp_path / "store").fingerprint == first
    assert prepare(GOOD + GOOD, "--overwrite").code == 0
    assert TokenStore.open(tmp_path / "store").num_samples == 2
    assert leftovers(tmp_path) == {"store"}


def test_a_failed_overwrite_leaves_the_old_store(prepare, tmp_path):
    assert prepare(GOOD).code == 0
    assert prepare(GOOD + BAD_LINES["bad JSON"], "--overwrite").code == 65
    assert TokenStore.open(tmp_path / "store").num_samples == 1
    assert leftovers(tmp_path) == {"store"}


def test_overwrite_never_removes_other_directories(prepare, tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "thesis.txt").write_text("years of work")
    result = prepare(GOOD, "--overwrite")
    assert result.code == 78 and "not a token store" in result.err
    assert (tmp_path / "store" / "thesis.txt").exists()


def test_an_unwritable_place_ends_in_73(hbp, tokenizer_folder, tmp_path):
    chats = tmp_path / "chats.jsonl"
    chats.write_bytes(GOOD)
    result = hbp("prepare", "--input", chats, "--tokenizer", tokenizer_folder, "--out", chats / "store")
    assert result.code == 73 and result.err.count("\n") == 1


def test_a_disk_that_fills_up_leaves_no_files(tokenizer, tmp_path):
    """A file size limit of the process stands in for the full disk: the write itself fails, halfway."""
    chats = tmp_path / "chats.jsonl"
    chats.write_bytes(GOOD * 3_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(DiskError, match="cannot be written: File too large"):
            prepare_store(inputs=[chats], tokenizer=tokenizer, out=tmp_path / "store")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert leftovers(tmp_path) == set()


def test_a_disk_that_is_full_from_the_start_leaves_no_files(tokenizer, tmp_path, monkeypatch):
    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("megatron_hbp.data.writer.open_builder", no_space)
    (tmp_path / "chats.jsonl").write_bytes(GOOD)
    with pytest.raises(DiskError, match="No space left on device"):
        prepare_store(inputs=[tmp_path / "chats.jsonl"], tokenizer=tokenizer, out=tmp_path / "store")
    assert leftovers(tmp_path) == set()


def test_progress_adds_up_to_the_bytes_of_all_inputs(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_hbp.data.prepare.BATCH_CHARACTERS", 200)
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path in paths:
        path.write_bytes(GOOD * 20 + b"\n\n")
    steps: list[int] = []
    store = prepare_store(inputs=paths, tokenizer=tokenizer, out=tmp_path / "store", on_progress=steps.append)
    assert sum(steps) == sum(path.stat().st_size for path in paths)
    assert len(steps) > 6
    assert [source.num_samples for source in store.manifest.sources] == [20, 20]


def test_the_process_itself_ends_without_a_traceback(tokenizer_folder, tmp_path):
    (tmp_path / "chats.jsonl").write_bytes(GOOD + BAD_LINES["bad UTF-8"])
    command = [
        sys.executable, "-m", "megatron_hbp.cli", "prepare", "--input", "chats.jsonl", "--out", "store",
        "--tokenizer", str(tokenizer_folder),
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}  # this checkout, not the installed one
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 65
    assert done.stderr.startswith("hbp: chats.jsonl:2: bad UTF-8: byte ")
    assert done.stderr.count("\n") == 1
