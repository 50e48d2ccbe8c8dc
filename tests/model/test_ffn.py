"""Feed-forward blocks: their formulas, sizes, and scale at the start."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kanlm.model.basis import BASES
from kanlm.model.ffn import XIELU, FeedForward, PolyNorm, arm_names, build_ffn, find_arm
from kanlm.model.ffn_kan import EdgeKAN
from kanlm.model.kan import KANLinear, LearnedFunction
from kanlm.train.health import kan_health

KAN_ARMS = arm_names("kan")
ARMS = arm_names()


def config(ffn_type: str, **more) -> SimpleNamespace:
    values = {
        "ffn_type": ffn_type,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "rms_norm_eps": 1e-6,
        "hidden_norm": False,
        "initializer_range": 0.02,
        "kan_basis": "bspline",
        "kan_grid_size": 8,
        "kan_order": 3,
        "kan_grid_min": -4.0,
        "kan_grid_max": 4.0,
        "kan_base": "silu",
        "kan_conditioning": "none",
        "kan_num_groups": 8,
        "kan_glu_form": "interpolated",
        "kan_initial": "default",
    }
    return SimpleNamespace(**values | more)


def initialised(ffn_type: str, seed: int = 0, **more) -> FeedForward:
    """A block as a model initialises it: matrices first, then each module's own wishes, children first."""
    torch.manual_seed(seed)
    block = build_ffn(config(ffn_type, **more))
    modules = list(block.modules())[::-1]
    for module in modules:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
    for module in modules:
        if isinstance(module, (KANLinear, LearnedFunction, FeedForward, PolyNorm, XIELU)):
            module.reset_parameters()
    return block


def normed_inputs(*shape, seed=100) -> torch.Tensor:
    return F.rms_norm(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), shape[-1:])


@pytest.mark.parametrize("arm", ARMS)
def test_block_maps_btd_to_btd_and_trains_every_parameter(arm):
    block = initialised(arm)
    u = normed_inputs(4, 50, 32).requires_grad_()
    y = block(u)
    assert y.shape == u.shape
    y.square().sum().backward()
    assert u.grad.abs().sum() > 0
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_formulas():
    u = normed_inputs(3, 5, 32)

    def weights(block, *names):
        return [getattr(block, name).weight.t() for name in names]

    activations = {"gelu": F.gelu, "relu2": lambda x: F.relu(x) ** 2}
    for arm, activation in activations.items():
        block = initialised(arm)
        up, down = weights(block, "up_proj", "down_proj")
        torch.testing.assert_close(block(u), activation(u @ up) @ down)
    for arm, activation in {"swiglu": F.silu, "geglu": F.gelu}.items():
        block = initialised(arm)
        gate, up, down = weights(block, "gate_proj", "up_proj", "down_proj")
        torch.testing.assert_close(block(u), (activation(u @ gate) * (u @ up)) @ down)
    block = initialised("kan_glu")
    gate, up, down = weights(block, "gate_proj", "up_proj", "down_proj")
    torch.testing.assert_close(block(u), (block.phi(u @ gate) * (u @ up)) @ down)
    block = initialised("kan_product")
    gate, up, down = weights(block, "gate_proj", "up_proj", "down_proj")
    torch.testing.assert_close(block(u), (block.phi(u @ gate) * block.psi(u @ up)) @ down)
    block = initialised("kan_act")
    up, down = weights(block, "up_proj", "down_proj")
    torch.testing.assert_close(block(u), block.phi(u @ up) @ down)
    block = initialised("kan_grouped")
    up, down = weights(block, "up_proj", "down_proj")
    torch.testing.assert_close(block(u), block.phi_hidden(block.phi_in(u) @ up) @ down)
    for arm in ("kan", "kan_mixed"):
        block = initialised(arm)
        hidden = block.up_proj(u)
        hidden = hidden / (hidden.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        torch.testing.assert_close(block(u), block.down_proj(hidden))
    assert isinstance(initialised("kan").up_proj, KANLinear)
    assert isinstance(initialised("kan_mixed").up_proj, nn.Linear)


@pytest.mark.parametrize("arm", ARMS)
def test_hidden_norm_is_the_block_on_normed_hidden_values(arm):
    """A pre-hook that norms what the activation sees gives the block with the option."""
    plain, normed = initialised(arm), initialised(arm, hidden_norm=True)
    normed.load_state_dict(plain.state_dict())
    u = normed_inputs(3, 5, 32)
    if issubclass(type(plain), EdgeKAN):  # has the norm in either case
        torch.testing.assert_close(normed(u), plain(u))
        return

    def norm(module, args, output):
        return output / (output.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    for name in ("gate_proj", "up_proj"):
        if hasattr(plain, name):
            getattr(plain, name).register_forward_hook(norm)
    torch.testing.assert_close(normed(u), plain(u))
    assert not torch.allclose(normed(u), initialised(arm)(u))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("basis", list(BASES))
def test_kan_glu_starts_as_swiglu_bit_for_bit(dtype, basis):
    kan_glu = initialised("kan_glu", kan_glu_form="residual", kan_basis=basis).to(dtype)
    swiglu = initialised("swiglu").to(dtype)
    swiglu.load_state_dict({name: p for name, p in kan_glu.state_dict().items() if "phi" not in name})
    u = normed_inputs(7, 33, 32).to(dtype)
    assert torch.equal(kan_glu(u), swiglu(u))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(kan_glu(u), swiglu(u))


def test_same_seed_gives_kan_glu_and_swiglu_the_same_matrices():
    one, other = initialised("kan_glu", kan_glu_form="residual"), initialised("swiglu")
    assert torch.equal(one.down_proj.weight, other.down_proj.weight)


def test_interpolated_kan_glu_starts_near_swiglu():
    kan_glu, swiglu = initialised("kan_glu", kan_grid_size=15), initialised("swiglu")
    swiglu.load_state_dict({name: p for name, p in kan_glu.state_dict().items() if "phi" not in name})
    u = normed_inputs(7, 33, 32)
    with torch.no_grad():
        assert float((kan_glu(u) - swiglu(u)).norm() / swiglu(u).norm()) < 1e-2


@pytest.mark.parametrize("arm", ARMS)
def test_parameter_counts(arm):
    d, h, k = 32, 48, 11
    expected = {
        "gelu": 2 * d * h,
        "relu2": 2 * d * h,
        "swiglu": 3 * d * h,
        "geglu": 3 * d * h,
        "kan": 2 * d * h * (k + 1),
        "kan_mixed": d * h * (k + 2),
        "kan_act": 2 * d * h + 8 * k,
        "kan_grouped": 2 * d * h + 2 * 8 * k,
        "kan_glu": 3 * d * h + 8 * k,
        "kan_product": 3 * d * h + 2 * 8 * k,
        "polynorm": 2 * d * h + 4,
        "xielu": 2 * d * h + 2,
    }
    assert sum(p.numel() for p in build_ffn(config(arm)).parameters()) == expected[arm]


@pytest.mark.parametrize("more", [{}, {"kan_base": "none"}, {"kan_conditioning": "whitened"}], ids=str)
@pytest.mark.parametrize("arm", [*KAN_ARMS, "gelu"])
def test_branch_starts_at_the_scale_of_the_mlp(arm, more):
    """Of the GELU MLP with equally many parameters; gated KANs at that of the SwiGLU with as many."""
    sizes = {"hidden_size": 128, "intermediate_size": 64}
    block = initialised(arm, **sizes, **more)
    u = normed_inputs(2000, 128)
    parameters = sum(p.numel() for p in block.parameters())
    if arm in ("kan_glu", "kan_product"):
        peer = initialised("swiglu", hidden_size=128, intermediate_size=round(parameters / 3 / 128), seed=1)
    else:
        peer = initialised("gelu", hidden_size=128, intermediate_size=round(parameters / 2 / 128), seed=1)
    with torch.no_grad():
        ratio = float(block(u).std() / peer(u).std())
    assert 0.8 < ratio < 1.25
    if arm == "gelu":
        with torch.no_grad():
            assert abs(float(block(u).square().mean().sqrt()) / block.gelu_scale() - 1) < 0.1


@pytest.mark.parametrize("depth", [2, 8, 24])
@pytest.mark.parametrize(
    "form", [{}, {"conditioning": "whitened"}, {"basis": "rbf"}, {"spline_share": 0.0}], ids=str
)
def test_layers_keep_variance_through_depth(depth, form):
    torch.manual_seed(0)
    x = torch.randn(200, 128)
    start = x.clone().requires_grad_()
    y = start
    for _ in range(depth):
        y = KANLinear(128, 128, **form)(F.rms_norm(y, (128,)))
    assert 0.7 < float(y.detach().std()) < 1.4
    (y * torch.randn_like(y)).sum().backward()
    assert 0.05 < float(start.grad.std()) < 20


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_steep_random_splines_blow_up_the_gradients_of_whitened_layers(share):
    """Why `spline_share` is small."""
    torch.manual_seed(0)
    start = torch.randn(200, 128).requires_grad_()
    y = start
    for _ in range(24):
        layer = KANLinear(128, 128, conditioning="whitened", spline_share=share)
        y = layer(F.rms_norm(y, (128,)))
    (y * torch.randn_like(y)).sum().backward()
    growth = float(start.grad.std())
    assert growth < 20 if share == 0.05 else growth > 1e5


BLOCKS = [(arm, {}) for arm in ARMS] + [
    *((arm, {"kan_conditioning": "whitened"}) for arm in ("kan", "kan_mixed")),
    *((arm, {"kan_base": "none"}) for arm in ("kan", "kan_mixed")),
    *((arm, {"kan_basis": "linear"}) for arm in KAN_ARMS),
    ("kan_grouped", {"kan_basis": "rational"}),
    ("kan_glu", {"kan_basis": "rational"}),
    ("kan_glu", {"kan_glu_form": "residual"}),
    *(
        (arm, {"kan_basis": basis})
        for arm in KAN_ARMS
        for basis in BASES
        if basis not in ("bspline", "linear")
    ),
]


def branches(arm: str, depth: int, x: torch.Tensor, **more) -> torch.Tensor:
    """x through `depth` normed residual blocks of the arm."""
    for layer in range(depth):
        block = initialised(arm, seed=layer, hidden_size=64, num_hidden_layers=depth, **more)
        x = x + block(F.rms_norm(x, (64,)))
    return x


@pytest.mark.parametrize("depth", [2, 8, 24])
@pytest.mark.parametrize(("arm", "more"), BLOCKS, ids=str)
def test_blocks_keep_variance_through_depth(arm, more, depth):
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = branches(arm, depth, x, **more)
    growth = float(y.detach().std() / x.detach().std())
    assert 0.95 < growth < 1.5
    # What all branches add is neither lost nor far louder than in the MLP of that width. (Fourier functions
    # are periodic, and fit SiLU badly, a third, and the identity worse.)
    peer = "swiglu" if find_arm(arm).gated else "gelu"
    with torch.no_grad():
        ratio = float((y - x).std() / (branches(peer, depth, x) - x).std())
    assert (0.04 if more.get("kan_basis") == "fourier" else 0.25) < ratio < 10, ratio
    y.sum().backward()
    assert 0.5 < float(x.grad.square().mean().sqrt()) < 2


def test_polynorm_by_hand():
    layer = PolyNorm().double()
    points = normed_inputs(3, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(layer, (points,))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, -1.0, 2.0]))
        layer.bias.fill_(0.25)
    x = torch.tensor([[1.0, -2.0, 3.0]], dtype=torch.float64)
    rms = [math.sqrt(sum(v ** (2 * i) for v in (1, -2, 3)) / 3) for i in (1, 2, 3)]
    expected = [0.5 * v / rms[0] - v**2 / rms[1] + 2 * v**3 / rms[2] + 0.25 for v in (1, -2, 3)]
    assert layer(x)[0].tolist() == pytest.approx(expected, rel=1e-5)


def test_xielu_by_hand():
    layer = XIELU().double()
    x = torch.tensor([-3.0, -0.5, 0.0, 0.7, 4.0], dtype=torch.float64)
    expected = [
        0.8 * v * v + 0.5 * v if v > 0 else 0.8 * (math.exp(v) - 1) - 0.8 * v + 0.5 * v for v in x.tolist()
    ]
    assert layer(x).tolist() == pytest.approx(expected, rel=1e-6)
    assert torch.autograd.gradcheck(layer, (x.clone().requires_grad_(),))


@pytest.mark.parametrize("arm", ARMS)
def test_autocast_and_bf16_run(arm):
    block = initialised(arm)
    u = normed_inputs(3, 7, 32)
    expected = block(u)
    with torch.autocast("cpu", torch.bfloat16):
        y = block(u)
    assert float((y - expected).norm() / expected.norm()) < 2e-2
    y = block.bfloat16()(u.bfloat16())
    assert y.dtype == torch.bfloat16 and float((y - expected).norm() / expected.norm()) < 3e-2


def test_unknown_type_is_named():
    with pytest.raises(ValueError, match="ffn_type.*'mlp'.*gelu.*kan_glu"):
        build_ffn(config("mlp"))


@pytest.mark.parametrize("arm", ["kan", "kan_mixed"])
def test_inputs_of_edge_functions_are_on_the_grid_and_train_beyond_it(arm):
    """On a grid of [-1, 1] a third of a normed layer's inputs would be off it, without a gradient."""
    block = initialised(arm, hidden_size=64, kan_grid_min=-3.0, kan_grid_max=3.0, kan_base="none")
    seen = []
    for module in block.modules():
        if isinstance(module, KANLinear):
            module.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    block(normed_inputs(500, 64))
    assert len(seen) == {"kan": 2, "kan_mixed": 1}[arm]
    for x in seen:
        assert float((x.abs() > 3).float().mean()) < 0.01
    far = torch.full((1, 48), 9.0).requires_grad_()
    block.down_proj(far).sum().backward()
    assert (far.grad != 0).all()


@pytest.mark.parametrize("arm", KAN_ARMS)
def test_inputs_of_a_model_as_configured_by_default_are_on_the_grid(arm):
    from kanlm.model import KanLMConfig, KanLMForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2}
    health = kan_health(KanLMForCausalLM(KanLMConfig(**sizes, ffn_type=arm)), torch.arange(64).view(2, 32))
    shares = [layer["outside_grid"] for layer in health.values() if "outside_grid" in layer]
    assert len(shares) == 2 * {"kan_mixed": 1, "kan_act": 1, "kan_glu": 1}.get(arm, 2)
    assert max(shares) < 0.01


@pytest.mark.parametrize("arm", ARMS)
def test_every_layer_of_a_model_counts(arm):
    """A loop over the layers that keeps only the last one's output passes all tests of single blocks."""
    from kanlm.model import KanLMConfig, KanLMForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3}
    model = KanLMForCausalLM(KanLMConfig(**sizes, ffn_type=arm, kan_grid_size=5)).eval()
    tokens = torch.randint(0, 64, (2, 12))
    model(tokens, labels=tokens).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    with torch.no_grad():
        before = model(tokens).logits
        for layer in model.model.layers:
            down = next(iter(layer.mlp.down_proj.parameters()))
            kept = down.clone()
            down += torch.randn_like(down)
            assert not torch.allclose(model(tokens).logits, before, atol=1e-3)
            down.copy_(kept)
