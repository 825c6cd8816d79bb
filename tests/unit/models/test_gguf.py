import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent))
import gguf_files as files

from gradsift.errors import DependencyError, ModelError
from gradsift.models import gguf as gguf_module
from gradsift.models.gguf import RECORD, convert_gguf, read_conversion, unpermute

CHAT = [{"role": "user", "content": "hello  12\n\n3"}, {"role": "assistant", "content": "hell\u00e9 x"}]


@given(heads=st.integers(1, 5), half=st.integers(1, 6), width=st.integers(1, 4))
def test_unpermute_undoes_interleaving(heads, half, width):
    weight = np.arange(heads * 2 * half * width, dtype=np.float32).reshape(-1, width)
    np.testing.assert_array_equal(unpermute(files.interleave(weight, heads), heads), weight)


@pytest.mark.parametrize("tied", [True, False])
def test_direct_route_gives_the_model_back(tmp_path, tied):
    model = files.llama(tied=tied)
    record = convert_gguf(files.write(model, tmp_path / "m.gguf"), tmp_path / "out")
    back, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert record.route == "direct"
    assert record.license == "apache-2.0"
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert {n for n, _ in back.named_parameters()} == {n for n, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(back.get_parameter(name), parameter, rtol=0, atol=0, msg=name)
    ids = torch.arange(20).reshape(2, 10)
    torch.testing.assert_close(back(ids).logits, model(ids).logits, rtol=0, atol=1e-6)
    for field in ("rms_norm_eps", "head_dim", "num_key_value_heads", "vocab_size", "tie_word_embeddings"):
        assert getattr(back.config, field) == pytest.approx(getattr(model.config, field), rel=1e-6), field


def test_direct_route_equals_transformers_on_quantized_weights(tmp_path):
    path = files.write(files.llama(seed=3), tmp_path / "m.gguf", quantize=True)
    convert_gguf(path, tmp_path / "out")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), parameter, rtol=0, atol=0, msg=name)
    same = ("rope_parameters", "rms_norm_eps", "head_dim", "bos_token_id", "eos_token_id", "pad_token_id")
    assert {k: getattr(ours.config, k) for k in same} == {k: getattr(theirs.config, k) for k in same}
    # Q4_1 keeps 4 bits of each weight: the file was really quantized.
    assert not torch.equal(ours.get_parameter("lm_head.weight"), files.llama(seed=3).lm_head.weight)


def test_tokenizer_equals_transformers_and_adds_no_bos(tmp_path):
    path = files.write(files.llama(), tmp_path / "m.gguf")
    convert_gguf(path, tmp_path / "out")
    ours = AutoTokenizer.from_pretrained(tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in ("hello hello", "\u00e9 \U0001f600\t x", "<|im_start|>a<|im_end|>", ""):
        assert ours(text).input_ids == theirs(text).input_ids
    assert ours.apply_chat_template(CHAT, tokenize=False) == theirs.apply_chat_template(CHAT, tokenize=False)
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (1, 2, 2)
    assert ours("hello").input_ids == [TOKEN_HELLO]


TOKEN_HELLO = files.TOKENS.index("hello")


def test_special_tokens_are_those_of_the_file_whatever_transformers_guesses(tmp_path, monkeypatch):
    plain = AutoTokenizer.from_pretrained

    def guessing(folder, **how):
        tokenizer = plain(folder, **how)
        if "gguf_file" in how:  # as transformers 5.17 does
            tokenizer.eos_token, tokenizer.pad_token = "<|im_start|>", None
            tokenizer.init_kwargs["eos_token_id"] = 1
        return tokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", guessing)
    path = files.write(files.llama(), tmp_path / "m.gguf")
    convert_gguf(path, tmp_path / "out")
    ours = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (1, 2, 2)
    monkeypatch.setattr(
        type(ours), "save_pretrained", lambda self, folder: type(self).__base__.save_pretrained(wrong, folder)
    )
    wrong = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    with pytest.raises(ModelError, match="special tokens of this GGUF file are lost") as caught:
        convert_gguf(path, tmp_path / "lost")
    assert "'eos': 1" in str(caught.value)
    assert not (tmp_path / "lost").exists()


def test_other_architectures_go_through_transformers(tmp_path):
    model = files.qwen2()
    record = convert_gguf(files.write(model, tmp_path / "q.gguf", architecture="qwen2"), tmp_path / "out")
    assert record.route == "transformers"
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(back.get_parameter(name), parameter, rtol=0, atol=0, msg=name)


def test_config_files_beside_the_gguf_are_not_mixed_in(tmp_path, monkeypatch):
    path = files.write(files.llama(), tmp_path / "m.gguf")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "auto_map": {"AutoConfig": "x.Y"}}))
    (tmp_path / "chat_template.jinja").write_text("EVIL")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "EVIL", "add_bos_token": True}))
    write_tokenizer, shown = gguf_module._write_tokenizer, []

    def watched(reader, alone, folder):
        shown.extend(p.name for p in alone.iterdir())
        write_tokenizer(reader, alone, folder)

    monkeypatch.setattr(gguf_module, "_write_tokenizer", watched)
    convert_gguf(path, tmp_path / "out")
    assert shown == ["model.gguf"]
    assert "EVIL" not in AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "chat_template.jinja",
        "config.json",
        RECORD,
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_record_is_read_back(tmp_path):
    record = convert_gguf(files.write(files.llama(), tmp_path / "m.gguf"), tmp_path / "out")
    assert read_conversion(tmp_path / "out") == record
    assert read_conversion(tmp_path) is None
    (tmp_path / "out" / RECORD).write_text("{")
    with pytest.raises(ModelError, match="damaged"):
        read_conversion(tmp_path / "out")


def test_damaged_files_are_refused_and_leave_nothing(tmp_path):
    good = files.write(files.llama(), tmp_path / "m.gguf").read_bytes()
    bad = tmp_path / "bad.gguf"
    for content, words in (
        (b"PK" + good[2:], "not a GGUF"),
        (b"", "not a GGUF"),
        (good[:200], "damaged"),
        (good[:9000], "damaged"),
    ):
        bad.write_bytes(content)
        with pytest.raises(ModelError, match=words):
            convert_gguf(bad, tmp_path / "out")
    shutil.copy(tmp_path / "m.gguf", tmp_path / "m-00001-of-00002.gguf")
    with pytest.raises(ModelError, match="one part of several"):
        convert_gguf(tmp_path / "m-00001-of-00002.gguf", tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_a_failure_halfway_publishes_nothing(tmp_path, monkeypatch):
    path = files.write(files.llama(), tmp_path / "m.gguf")

    def fail(reader, alone, folder):
        assert (folder / "model.safetensors").is_file()
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf_module, "_write_tokenizer", fail)
    with pytest.raises(KeyboardInterrupt):
        convert_gguf(path, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf"]


def test_unknown_architecture_is_refused(tmp_path):
    path = files.write(files.llama(), tmp_path / "m.gguf", architecture="nosuch")
    with pytest.raises(ModelError, match="cannot read"):
        convert_gguf(path, tmp_path / "out")


def test_without_the_gguf_package_the_extra_is_named(tmp_path, monkeypatch):
    path = files.write(files.llama(), tmp_path / "m.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(DependencyError, match=r"gradsift\[demo\]"):
        convert_gguf(path, tmp_path / "out")
