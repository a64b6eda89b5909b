"""The demo's corpus: real text, named sources, disjoint splits, the same bytes for the same seed."""

import json
from pathlib import Path

import pytest

from megatron_hbp.data.prepare import prepare_store
from megatron_hbp.data.tokenizer import ChatTokenizer
from megatron_hbp.demo.corpus import CorpusSize, build_corpus
from megatron_hbp.errors import ConfigError

SIZES = {
    "train": CorpusSize(conversations=60_000, documents=120_000),
    "heldout": CorpusSize(conversations=8_000, documents=15_000),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    return folder, build_corpus(folder, seed=3, vocab_size=1024, max_sample_tokens=4096, **SIZES)


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_summary_matches_the_prepared_stores(built, tmp_path):
    _, summary = built
    tokenizer = ChatTokenizer.load(str(summary.tokenizer))
    assert tokenizer.info.vocab_size == summary.vocab_size == 1024
    for split in (summary.train, summary.heldout):
        store = prepare_store(inputs=[split.path], tokenizer=tokenizer, out=tmp_path / split.path.stem)
        assert store.num_samples == split.num_conversations + split.num_documents
        assert store.manifest.num_tokens == split.num_tokens
        assert store.lengths.max() == split.longest <= 4096
        assert store.loss_tokens.min() > 0
    assert summary.train.num_documents_cut > 0


def test_splits_are_disjoint_and_every_sample_names_its_origin(built):
    folder, _ = built
    train, heldout = (records(folder / f"{split}.jsonl") for split in ("train", "heldout"))
    for field in ("origin", "messages"):
        assert not {str(record[field]) for record in train} & {str(record[field]) for record in heldout}
    for record in train + heldout:
        assert record["origin"].startswith(("chitchat-dataset ", "derived from CPython 3."))


def test_roles_alternate_and_the_assistant_speaks_last(built):
    folder, _ = built
    for record in records(folder / "train.jsonl"):
        roles = [message["role"] for message in record["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)


def test_documents_are_whole_lines_of_the_standard_library(built):
    import sysconfig

    folder, _ = built
    for record in records(folder / "train.jsonl"):
        _, _, name = record["origin"].partition("sources: ")
        if name:
            source = (Path(sysconfig.get_path("stdlib")) / name).read_text(encoding="utf-8")
            answer = record["messages"][1]["content"]
            assert source.startswith(answer) and (answer.endswith("\n") or answer == source)
            assert not {"test", "site-packages"} & set(Path(name).parts)


def test_the_seed_alone_decides_the_text(built, tmp_path):
    folder, _ = built
    for seed in (3, 4):
        build_corpus(tmp_path / str(seed), seed=seed, vocab_size=1024, max_sample_tokens=4096, **SIZES)
    files = ("train.jsonl", "heldout.jsonl", "tokenizer/tokenizer.json", "tokenizer/chat_template.jinja")
    for file in files:
        assert (folder / file).read_bytes() == (tmp_path / "3" / file).read_bytes()
    assert (folder / files[0]).read_bytes() != (tmp_path / "4" / files[0]).read_bytes()


def test_a_request_for_more_text_than_exists(tmp_path):
    with pytest.raises(ConfigError, match="request less"):
        build_corpus(tmp_path, train=CorpusSize(conversations=10**9, documents=1_000), heldout=SIZES["heldout"])
