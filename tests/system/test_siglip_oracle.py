"""vision.py's encoder against transformers' SiglipVisionModel."""
from dataclasses import replace

import pytest
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from conftest import close, n_parameters, randomise, shapes
from small_models import FEATURES, SIGLIPS, close_gradients, gradients_of
from vision import SIGLIP_PRESETS, SigLIP, SigLIPConfig

SO400M = SIGLIP_PRESETS["so400m-patch14-384"]
TOY = SIGLIP_PRESETS["toy"]


def their_tower(config: SigLIPConfig) -> SiglipVisionModel:
    return SiglipVisionModel(SiglipVisionConfig(
        hidden_size=config.hidden_size, num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads, intermediate_size=config.intermediate_size,
        image_size=config.image_size, patch_size=config.patch_size,
        layer_norm_eps=config.layer_norm_eps, hidden_act="gelu_pytorch_tanh",
        attn_implementation="eager", vision_use_head=False))


def hub_name(name: str) -> str:
    """transformers' parameter names, whose prefix depends on its version."""
    return name.removeprefix("vision_model.")


@pytest.mark.parametrize("name, feature_layer", FEATURES)
def test_siglip_equals_transformers(name, feature_layer):
    config = SIGLIPS[name]
    theirs = randomise(their_tower(config)).eval()
    ours = SigLIP(replace(config, feature_layer=feature_layer))
    ours.load_state_dict({hub_name(name): p for name, p in theirs.state_dict().items()})

    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(3, 3, config.image_size, config.image_size, generator=generator)
    our_pixels, their_pixels = pixels.clone().requires_grad_(), pixels.clone().requires_grad_()
    F = ours(our_pixels)
    out = theirs(their_pixels, output_hidden_states=True)
    F_theirs = out.last_hidden_state
    if feature_layer is not None:
        F_theirs = out.hidden_states[feature_layer]
    assert F.shape == (3, config.n_patches, config.hidden_size)
    close(F, F_theirs)

    g = torch.randn(F.shape, generator=generator)
    (F * g).sum().backward()
    (F_theirs * g).sum().backward()
    close(our_pixels.grad, their_pixels.grad)
    their_gradients = {hub_name(name): p.grad for name, p in theirs.named_parameters()}
    close_gradients(gradients_of(ours), their_gradients, alone=config.n_patches == 1)


def test_so400m_has_the_released_parameters():
    """The figures of the released configuration written out, so a wrong preset shows too."""
    with torch.device("meta"):
        ours = SigLIP(SO400M)
        theirs = SiglipVisionModel(SiglipVisionConfig(
            hidden_size=1152, num_hidden_layers=27, num_attention_heads=16,
            intermediate_size=4304, image_size=384, patch_size=14))
    expected = {hub_name(name): shape for name, shape in shapes(theirs).items()}
    expected = {name: s for name, s in expected.items() if not name.startswith("head.")}
    assert shapes(ours) == expected
    head = theirs.get_submodule("head" if hasattr(theirs, "head") else "vision_model.head")
    assert n_parameters(ours) == n_parameters(theirs) - n_parameters(head)
    assert (SO400M.layer_norm_eps, SO400M.n_heads, SO400M.n_patches) == (1e-6, 16, 729)
    assert (SO400M.image_mean, SO400M.image_std, SO400M.feature_layer) == (0.5, 0.5, None)


def test_toy_has_the_parameters_of_the_same_architecture():
    with torch.device("meta"):
        ours, theirs = SigLIP(TOY), their_tower(TOY)
    assert shapes(ours) == {hub_name(name): shape for name, shape in shapes(theirs).items()}
    assert n_parameters(ours) == n_parameters(theirs)
