"""Model folders: what is read, what is refused, and that what we write loads in transformers."""

import json
import logging
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from rlhfuse.models.loading import (
    load_config,
    load_model,
    load_stage,
    load_trained_config,
    save_pretrained,
)
from rlhfuse.models.stage import Head
from tests.models.tiny import FAMILIES, save_tiny


def edit_config(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def save_tokenizer(path: Path, size: int) -> None:
    vocabulary = {f"w{i}": i for i in range(size)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(path)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("head", "tied"), [(Head.LM, False), (Head.LM, True), (Head.SCALAR, False)]
)
@pytest.mark.parametrize("shard_bytes", [1 << 40, 20_000])
def test_what_is_saved_loads_in_transformers_and_here(
    tmp_path: Path, family: str, head: Head, tied: bool, shard_bytes: int
) -> None:
    model = save_tiny(tmp_path / "a", family, head=head, tied=tied)
    save_tokenizer(tmp_path / "a", 211)
    stage = load_model(tmp_path / "a", head=head)
    tensors = stage.named_hf_parameters()
    save_pretrained(
        tmp_path / "b",
        load_config(tmp_path / "a"),
        tensors,
        tokenizer_from=tmp_path / "a",
        shard_bytes=shard_bytes,
    )
    auto = AutoModelForCausalLM if head is Head.LM else AutoModelForSequenceClassification
    loaded: Any = auto.from_pretrained(tmp_path / "b", output_loading_info=True)
    again, report = loaded
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids = torch.arange(1, 12)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            again.eval()(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5
        )
    assert AutoTokenizer.from_pretrained(tmp_path / "b").vocab_size == 211
    reloaded = dict(load_model(tmp_path / "b", head=head).named_hf_parameters())
    for name, parameter in stage.named_hf_parameters():
        assert torch.equal(reloaded[name], parameter)


class Reader:
    """A file of tensors that remembers which were read."""

    read: ClassVar[list[str]] = []

    def __init__(self, file: Path, framework: str) -> None:
        self._file: Any = safe_open(file, framework=framework)

    def __enter__(self) -> "Reader":
        self._file.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)

    def get_tensor(self, name: str) -> torch.Tensor:
        self.read.append(name)
        tensor: torch.Tensor = self._file.get_tensor(name)
        return tensor


@pytest.mark.parametrize("tied", [False, True])
def test_a_stage_reads_its_own_tensors_and_no_others(
    tmp_path: Path, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of sharded files, those that hold none of its tensors may be absent."""
    save_tiny(tmp_path / "a", "qwen3", tied=tied)
    whole = dict(load_model(tmp_path / "a", head=Head.LM).named_hf_parameters())
    config = load_config(tmp_path / "a")
    monkeypatch.setattr("rlhfuse.models.loading.safe_open", Reader)
    for number, layers in enumerate((range(2), range(2, 4))):
        folder = tmp_path / f"b{number}"
        save_pretrained(folder, config, whole.items(), tokenizer_from=None, shard_bytes=20_000)
        cut: dict[str, Any] = {"layers": layers, "first": number == 0, "last": number == 1}
        Reader.read.clear()
        stage = load_stage(folder, head=Head.LM, **cut)
        own = stage.hf_names_to_load()
        assert sorted(Reader.read) == sorted(own)
        assert len(own) < len(whole)
        index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        needless = set(index.values()) - {index[name] for name in own}
        assert needless
        for file in needless:
            (folder / file).unlink()
        for name, parameter in load_stage(folder, head=Head.LM, **cut).named_hf_parameters():
            assert torch.equal(parameter, whole[name]), name


def test_a_new_scalar_head_only_when_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_tiny(tmp_path, "llama")
    with pytest.raises(ValueError, match="ask for a new head"):
        load_model(tmp_path, head=Head.SCALAR)
    with caplog.at_level(logging.WARNING):
        one = load_model(tmp_path, head=Head.SCALAR, new_head_seed=3)
    assert "new one, seed 3" in caplog.text
    last = load_stage(
        tmp_path, head=Head.SCALAR, layers=range(2, 4), first=False, last=True, new_head_seed=3
    )
    assert torch.equal(one.score.weight, last.score.weight)  # however the model is cut
    other = load_model(tmp_path, head=Head.SCALAR, new_head_seed=4)
    assert not torch.equal(one.score.weight, other.score.weight)


def test_refusals_name_place_and_way_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere: no config\.json"):
        load_config(tmp_path / "nowhere")
    save_tiny(tmp_path / "reward", "llama", head=Head.SCALAR)
    with pytest.raises(ValueError, match="a language model is needed"):
        load_model(tmp_path / "reward", head=Head.LM)
    save_tiny(tmp_path / "m", "qwen2")
    edit_config(tmp_path / "m", model_type="gpt2")
    with pytest.raises(ValueError, match="'gpt2' is not supported"):
        load_config(tmp_path / "m")
    edit_config(tmp_path / "m", model_type="qwen2", intermediate_size=55)
    with pytest.raises(ValueError, match="shape"):
        load_model(tmp_path / "m", head=Head.LM)
    edit_config(tmp_path / "m", intermediate_size=101, num_hidden_layers=5)
    edit_config(tmp_path / "m", layer_types=["full_attention"] * 5)
    with pytest.raises(ValueError, match="missing 12 tensors"):
        load_model(tmp_path / "m", head=Head.LM)
    edit_config(tmp_path / "m", rope_parameters={"rope_type": "dynamic", "factor": 2.0})
    with pytest.raises(ValueError, match="rope type 'dynamic'"):
        load_config(tmp_path / "m")
    edit_config(tmp_path / "m", rope_parameters=None, layer_types=["sliding_attention"] * 5)
    with pytest.raises(ValueError, match="sliding-window"):
        load_config(tmp_path / "m")


def test_dropout_within_attention_is_refused_in_training_alone(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    assert load_trained_config(tmp_path).model_type == "llama"
    edit_config(tmp_path, attention_dropout=0.1)
    with pytest.raises(
        ValueError, match=r"attention_dropout 0\.1 .* set it to 0\.0 in config\.json"
    ):
        load_trained_config(tmp_path)
    load_model(tmp_path, head=Head.LM)  # to score: nothing is dropped there
