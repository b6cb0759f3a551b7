"""train.shard on one process: what is compiled, and what that does not change."""
import functools

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from conftest import close
from small_models import SAMPLES, gradients_of, row_of, small_vlm
from train import shard

CPU = torch.device("cpu")


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def graphs(monkeypatch) -> list:
    """What torch.compile makes of a model, to run as it is: without a compiler of machine code."""
    made = []

    def aot_eager(graph, inputs):
        made.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=aot_eager))
    return made


def loss_and_gradients(vlm: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Of two different rows, one after the other. The model's gradients are whole."""
    loss = sum(vlm(*row_of(samples)) for samples in (SAMPLES, SAMPLES[1:4]))
    loss.backward()
    gradients = {name: g.full_tensor() if isinstance(g, DTensor) else g
                 for name, g in gradients_of(vlm).items()}
    return loss.detach(), gradients


def test_compiled_blocks_are_graphs_recomputed_ones_too(one_process, graphs):
    """As many and with the same gradients: the compiler does not enter what checkpoint wraps."""
    loss, gradients = loss_and_gradients(small_vlm())
    made = []
    for recompute in (False, True):
        torch._dynamo.reset()
        graphs.clear()
        vlm = small_vlm()
        shard(vlm, CPU, recompute=recompute, compile=True)
        our_loss, ours = loss_and_gradients(vlm)
        made.append(len(graphs))
        close(our_loss, loss)
        for name, gradient in gradients.items():
            weight = gradients[name.replace("k_proj.bias", "k_proj.weight")]
            close(ours[name], gradient, scale=weight.abs().max().item())
    assert made[0] == made[1] >= 2          # a block of either tower at least
