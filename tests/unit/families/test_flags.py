"""Models as Megatron-LM's flags and back, through Megatron-LM's own parser and checks."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from megatron_hbp.families import MODELS, model_flags, shape_flags
from megatron_hbp.planning.core.model import AttentionShape, FeedForward, ModelSpec, dense_model
from megatron_hbp.planning.cost.file import model_from_json
from megatron_hbp.planning.cost.presets import DEEPSEEK_V2
from tests.launching import ROOT


@pytest.fixture(scope="module")
def parsed(tmp_path_factory) -> dict[str, list[ModelSpec]]:
    out = tmp_path_factory.mktemp("families") / "specs.json"
    command = [sys.executable, "-W", "ignore", "-m", "tests.unit.families.parse", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: list(map(model_from_json, specs)) for name, specs in json.loads(out.read_text()).items()}


@pytest.mark.parametrize("name", MODELS)
def test_flags_are_parsed_to_the_same_model(parsed, name):
    """By the parser alone, and after the checks of a run."""
    spec, _ = MODELS[name]
    for found in parsed[name]:
        assert replace(found, name=spec.name) == spec


def test_two_kv_heads_at_tp_8_are_two_of_the_model_and_one_of_a_rank(parsed):
    (found,) = parsed["two KV heads"]
    expected = dense_model("x", num_layers=4, hidden=512, num_heads=8, num_kv_heads=2, width=1024, vocabulary=0)
    assert found.layers == expected.layers
    assert found.attention.weights(512) == 512 * (512 + 2 * 2 * 64 + 512)
    rank = found.attention.on_tensor_parallel_rank(8)
    assert (rank.num_query_heads, rank.num_kv_heads) == (1, 1)


def test_what_flags_leave_out_is_megatrons_default(parsed):
    """No gate, as many KV heads as query heads, experts in every second layer as wide as the MLP, tied embeddings."""
    (found,) = parsed["no gate"]
    attention = AttentionShape(num_query_heads=8, num_kv_heads=8, qk_width=64, v_width=64)
    dense = FeedForward(width=2048, num_matrices=2)
    experts = replace(dense, num_experts=16, experts_per_token=2)
    assert [(count, layer.attention) for count, layer in found.layers] == [(1, attention)] * 2
    assert [layer.feed_forward for _, layer in found.layers] == [experts, dense]
    assert found.tied_embeddings


def test_words_are_strings_and_flags_come_once():
    for name in MODELS:
        flags = model_flags(name)
        assert all(isinstance(word, str) for word in flags)
        names = [word for word in flags if word.startswith("--")]
        assert len(names) == len(set(names))


def test_queries_that_are_not_compressed_have_no_rank():
    (count, layer), *rest = DEEPSEEK_V2.layers
    plain = replace(layer.attention, q_latent=DEEPSEEK_V2.hidden)
    layers = tuple((n, replace(each, attention=plain)) for n, each in ((count, layer), *rest))
    assert "--q-lora-rank" in shape_flags(DEEPSEEK_V2)
    assert "--q-lora-rank" not in shape_flags(replace(DEEPSEEK_V2, layers=layers))


@pytest.mark.parametrize("name", MODELS)
def test_the_module_prints_a_models_flags(name):
    done = subprocess.run(
        [sys.executable, "-m", "megatron_hbp.families", name], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == model_flags(name)


@pytest.mark.parametrize("words", [[], ["gpt-5"], ["llama3.1-8b", "more"]])
def test_the_module_names_the_models_there_are(words):
    done = subprocess.run(
        [sys.executable, "-m", "megatron_hbp.families", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 78 and done.stdout == ""
    assert done.stderr == f"families: name one of {', '.join(MODELS)}\n"
