"""What a repair asks of Automatic1111 and Forge: which weights a file is for, and how a trial is made known. No host."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sd_dejavu.core.settings import options_of
from sd_dejavu.hosts.webui import audit, repair
from sd_dejavu.hosts.webui.controls import label_of
from sd_dejavu.hosts.webui.guidance import Automatic1111, Forge
from sd_dejavu.hosts.webui.references import Building
from sd_dejavu.report import panel
from sd_dejavu.training.lora_files import Contents, change, modules_of
from sd_dejavu.training.repair import Point, Repaired, file_called
from sd_dejavu.training.spectral import HostPart, Update, places_by_keys
from sd_dejavu.training.tasks import Variant

NETWORK = "lora_unet_input_blocks_1_1_attn2_to_k"
ENCODER = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
JOINED = "lora_te2_text_model_encoder_layers_0_self_attn_{}_proj"


def plain(name: str, outputs: int, inputs: int) -> dict[str, Tensor]:
    return {f"{name}.lora_up.weight": torch.ones(outputs, 1), f"{name}.lora_down.weight": torch.ones(1, inputs)}


class Tree(nn.Module):
    """Modules below each other, by their dotted names."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


class Engine(Tree):
    id_end = 0

    def process_texts(self, texts: list[str]) -> None: ...


# --------------------------------------------------------------------------------------- Automatic1111


@pytest.fixture
def a1111(monkeypatch: pytest.MonkeyPatch) -> Any:
    """(step, contents, the layers by name) of a model with CLIP and OpenCLIP, and a LoRA for both and the network."""
    network, clip = nn.Linear(3, 2), nn.Linear(4, 4)
    joined = nn.MultiheadAttention(4, 1)
    engines = [Engine(wrapped=Tree(q_proj=clip)), Engine(wrapped=Tree(attn=joined))]
    sd_model = SimpleNamespace(
        model=SimpleNamespace(diffusion_model=Tree(attn2=Tree(to_k=network))),
        conditioner=SimpleNamespace(embedders=engines),
    )
    tensors = {**plain(NETWORK, 2, 3), **plain(ENCODER, 4, 4), **plain(JOINED.format("k"), 4, 4)}
    tensors |= {**plain(JOINED.format("out"), 4, 4), **plain("lora_unet_gone", 2, 3)}

    def read(key: str, sd_key: str, module: nn.Module, shape: tuple[int, ...]) -> Any:
        key = f"{key}.lora_down.weight"
        return SimpleNamespace(network_key=key, sd_key=sd_key, sd_module=module, shape=torch.Size(shape))

    modules = [
        read(NETWORK, "diffusion_model_input_blocks_1_1_attn2_to_k", network, (2, 3)),
        read(ENCODER, "transformer_text_model_encoder_layers_0_self_attn_q_proj", clip, (4, 4)),
        read(JOINED.format("k"), "1_model_transformer_resblocks_0_attn_k_proj", joined, (4, 4)),
        read(JOINED.format("out"), "1_model_transformer_resblocks_0_attn_out_proj", joined.out_proj, (4, 4)),
    ]

    def load_network(name: str, entry: str) -> Any:
        assert (name, entry) == ("mine", "the host's entry")
        return SimpleNamespace(modules={one.sd_key: one for one in modules})

    networks: Any = SimpleNamespace(available_networks={"mine": "the host's entry"}, load_network=load_network)
    monkeypatch.setitem(sys.modules, "networks", networks)
    layers = {"network": network, "clip": clip, "joined": joined}
    return SimpleNamespace(sd_model=sd_model), modules_of(tensors), layers


def test_automatic1111_tells_which_weight_each_module_is_for(a1111: Any) -> None:
    step, contents, layers = a1111
    found = Automatic1111().places(step, contents, "mine")
    assert {(one.part, one.name) for one in found.values()} == {
        ("unet", "attn2.to_k"),
        ("text_encoder", "wrapped.q_proj"),
        ("text_encoder_2", "wrapped.attn.in_proj_weight"),
        ("text_encoder_2", "wrapped.attn.out_proj"),
    }
    assert torch.equal(found[NETWORK].weight, layers["network"].weight)
    # Queries, keys and values lie below each other: of 4 each the keys are the rows 4 to 7.
    assert torch.equal(found[JOINED.format("k")].weight, layers["joined"].in_proj_weight[4:8])
    assert torch.equal(found[JOINED.format("out")].weight, layers["joined"].out_proj.weight)
    assert all(one.reads_text for one in found.values())


def test_what_automatic1111_adds_in_place_is_not_taken_for_the_weight(a1111: Any) -> None:
    step, contents, layers = a1111
    before = {name: layers[name].weight.detach().clone() for name in ("network", "clip")}
    layers["network"].network_weights_backup = before["network"].clone()
    with torch.no_grad():
        layers["network"].weight.add_(1)
    found = Automatic1111().places(step, contents, "mine")
    with torch.no_grad():
        layers["clip"].weight.add_(1)  # of the LoRA in the next run
    assert torch.equal(found[NETWORK].weight, before["network"])
    assert torch.equal(found[ENCODER].weight, before["clip"])


def test_a_file_that_automatic1111_cannot_read_is_told(a1111: Any) -> None:
    step, contents, _ = a1111
    with pytest.raises(ValueError, match="the host cannot read the LoRA other: KeyError"):
        Automatic1111().places(step, contents, "other")


# ------------------------------------------------------------------------------------------------ Forge


def test_forge_tells_which_weight_each_module_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    own = nn.Linear(4, 4)
    network, clip = Tree(attn2=Tree(to_k=nn.Linear(3, 2))), Tree(clip_l=Tree(transformer=Tree(q_proj=own)))
    before = torch.zeros(2, 3)
    unet = SimpleNamespace(
        model=SimpleNamespace(diffusion_model=network),
        lora_loader=SimpleNamespace(backup={"diffusion_model.attn2.to_k.weight": before}),
    )
    patcher = SimpleNamespace(model=clip, lora_loader=SimpleNamespace(backup={}))
    step: Any = SimpleNamespace(
        sd_model=SimpleNamespace(forge_objects=SimpleNamespace(clip=SimpleNamespace(patcher=patcher))),
        denoiser=SimpleNamespace(
            inner_model=SimpleNamespace(inner_model=SimpleNamespace(forge_objects=SimpleNamespace(unet=unet)))
        ),
    )
    lora = ModuleType("backend.patcher.lora")
    keys = {NETWORK: "diffusion_model.attn2.to_k.weight", ENCODER: "clip_l.transformer.q_proj.weight"}
    vars(lora).update(
        model_lora_keys_unet=lambda model, known: {NETWORK: keys[NETWORK]},
        model_lora_keys_clip=lambda model, known: {ENCODER: keys[ENCODER]},
    )
    for module in (ModuleType("backend"), ModuleType("backend.patcher"), lora):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    found = Forge().places(step, modules_of({**plain(NETWORK, 2, 3), **plain(ENCODER, 4, 4)}), "mine")
    assert {(one.part, one.name) for one in found.values()} == {("unet", "attn2.to_k"), ("text_encoder", "q_proj")}
    assert torch.equal(found[NETWORK].weight, before)
    assert torch.equal(found[ENCODER].weight, own.weight)


# ------------------------------------------------------------------------------------- what they share


def test_what_a_host_calls_otherwise_is_written_in_trainers_names() -> None:
    """A file in diffusers' names that is changed comes out in kohya's, as both hosts read them."""
    weight = torch.eye(4)
    names = {
        "text_encoder.layers.0": "clip_l.transformer.text_model.layers.0.weight",
        "text_encoder_2.layers.0": "clip_g.transformer.text_model.layers.0.weight",
        "unet.to_k": "diffusion_model.blocks.1.to_k.weight",
        "unet.too_wide": "diffusion_model.wide.weight",
    }
    tensors = {
        f"{name}.lora_{side}.weight": torch.ones(*shape)
        for name in names
        for side, shape in (("A", (1, 4)), ("B", (4, 1)))
    }
    tensors["unet.too_wide.lora_A.weight"] = torch.ones(1, 5)
    contents: Contents = modules_of(tensors)
    given = dict.fromkeys(names.values(), weight)
    found = places_by_keys(contents, [HostPart("unet", names, given.get), HostPart("text_encoder", {}, given.get)])
    changed = Update(contents, found).tensors("strength", 0.5)
    assert {key.partition(".")[0] for key in changed} == {
        "lora_te1_text_model_layers_0",
        "lora_te2_text_model_layers_0",
        "lora_unet_blocks_1_to_k",
    }
    alone = {name: place for name, place in found.items() if place.part == "text_encoder"}
    (name,) = {key.partition(".")[0] for key in Update(contents, alone).tensors("strength", 0.5)}
    assert name == "lora_te_text_model_layers_0"


def test_parts_of_one_weight_keep_the_names_that_tell_them_apart() -> None:
    """Flux and Stable Diffusion 3 in ComfyUI and Forge have the weights of q, k and v in one, and turn about a last one."""
    names: dict[str, Any] = {
        f"transformer.attn.to_{one}": ("diffusion_model.qkv.weight", (0, 4 * n, 4)) for n, one in enumerate("qkv")
    }
    names["transformer.norm_out"] = ("diffusion_model.last.weight", None, lambda weight: weight.flip(0))
    tensors = {
        f"{name}.lora_{side}.weight": torch.full(shape, float(n))
        for n, name in enumerate(names, 1)
        for side, shape in (("A", (1, 4)), ("B", (4, 1)))
    }
    contents = modules_of(tensors)
    weights = {"diffusion_model.qkv.weight": torch.eye(12, 4), "diffusion_model.last.weight": torch.eye(4)}
    found = places_by_keys(contents, [HostPart("unet", names, weights.get)])
    changed = modules_of(Update(contents, found).tensors("strength", 0.5))
    for n, (name, module) in enumerate(zip(names, changed.modules, strict=True), 1):
        assert module.name == name
        torch.testing.assert_close(change(torch.eye(4), module), torch.full((4, 4), 0.5 * n * n))


def test_a_trial_is_known_to_the_host_while_it_is_drawn(tmp_path: Path) -> None:
    entry = SimpleNamespace(name="mine", alias="Mine", filename="mine.safetensors", hash="abc", shorthash="a")
    networks = SimpleNamespace(
        available_networks={"mine": entry}, available_network_aliases={"Mine": entry}, networks_in_memory={}
    )
    tags = []
    for file in ("a.safetensors", "b.safetensors"):
        with repair._known_to_the_host(networks, "mine", Variant(file, 0.5)) as tag:
            (name,) = networks.available_networks.keys() - {"mine"}
            known = networks.available_network_aliases[name]
            assert tag == f"<lora:{name}:0.5>" and (known.filename, known.alias, known.shorthash) == (file, name, "")
            networks.networks_in_memory[name] = "as the host keeps what it has read"
            tags.append(tag)
    with repair._known_to_the_host(networks, "mine", Variant(base=True)) as tag:
        assert tag == ""
    assert len(set(tags)) == 2  # the host takes one name for one LoRA
    assert list(networks.available_networks) == ["mine"] and list(networks.available_network_aliases) == ["Mine"]
    assert networks.networks_in_memory == {} and entry.filename == "mine.safetensors" and entry.hash == "abc"


def test_values_are_read_by_their_names() -> None:
    asked = repair.read({"lora": "mine", "save_as": "mended", "way": "strength", "steps": 9})
    assert (asked.what.lora, asked.what.save_as, asked.wanted.way, asked.measurement.steps) == (
        "mine",
        "mended",
        "strength",
        9,
    )
    for wrong, why in (
        ({"save_as": "../x"}, "cannot be the new LoRA's name"),
        ({"strength": 0.5}, "no argument strength"),
        ({"width": 65}, "width must be a multiple of 8"),
    ):
        with pytest.raises(ValueError, match=why):
            repair.read(wrong)
    assert file_called("a (2).b") == "a (2).b.safetensors"
    for name in ("", ".hidden", "a/b", "a\\b", "a:b", "x" * 101):
        with pytest.raises(ValueError, match="cannot be the new LoRA's name"):
            file_called(name)


def test_no_two_controls_of_the_tab_are_called_the_same() -> None:
    """Automatic1111 keeps the values of a tab's controls by what they are called, and mixes up those of one name."""
    audited = {known.name for known in audit.OPTIONS}
    own = [known for known in repair.OPTIONS if known.name not in audited]
    called = Counter(label_of(known) for known in (*audit.OPTIONS, *options_of(Building), *own))
    assert [label for label, times in called.items() if times > 1] == []


def test_the_page_shows_the_course_and_where_the_file_lies() -> None:
    whole, half = Point("strength", 1.0, 7, 8, 1.0), Point("strength", 0.5, 0, 8, 0.625)
    page = panel.course(Repaired((whole, half), whole, half, 0.1), "Lora/<b>.safetensors")
    assert "Copies before: 7 of 8; after: 0 of 8; likeness kept: 62%" in page and "<b>" not in page
    assert "Saved as Lora/&lt;b&gt;.safetensors." in page and page.count("<tr>") == 3
    assert "<td>0.5</td><td>0 of 8</td><td>0%</td><td>62%</td>" in page
