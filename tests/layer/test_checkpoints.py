"""The authors' released state dicts: three layouts are read, everything else is refused by name."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deqfuse import Anderson, DEQFusion

DIM, N, ROWS = 24, 3, 5
LAYOUTS = ["root", "brca", "mmimdb"]
TIGHT = Anderson(tol=1e-12, max_iter=500, rescue=True)


class ReleasedLayer(nn.Module):
    """The released layout, written for this test: names of the state dict and the joint step."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.layout = layout
        self.func_ = nn.Module()
        self.func_.branches = nn.ModuleList(self._cell() for _ in range(N))
        self.func_.branches.append(self._fusion())
        if layout != "brca":
            self.weights = nn.ParameterList(nn.Parameter(torch.rand(1) + 0.5) for _ in range(N))
            self.bias = nn.Parameter(torch.rand(1))

    @staticmethod
    def _cell() -> nn.Module:
        cell = nn.Module()
        cell.conv1, cell.conv2 = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        cell.gn1, cell.gn2, cell.gn3 = (nn.GroupNorm(4, DIM) for _ in range(3))
        return cell

    @staticmethod
    def _fusion() -> nn.Module:
        fusion = nn.Module()
        fusion.gate, fusion.fuse = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        fusion.gn3 = nn.GroupNorm(4, DIM)
        return fusion

    def step(self, z: list[Tensor], xs: list[Tensor], x_fuse: Tensor) -> list[Tensor]:
        *cells, fusion = self.func_.branches
        new = []
        for cell, z_i, x_i in zip(cells, z[:-1], xs, strict=True):
            h = cell.gn2(cell.conv2(F.relu(cell.gn1(cell.conv1(z_i)))) + x_i)
            new.append(cell.gn3(F.relu(h + z_i)))
        purified = [z[-1] * fusion.gate(z_i + z[-1]) for z_i in new]  # with the new cells
        e = fusion.fuse(torch.stack(purified).sum(0)) + x_fuse
        if self.layout == "mmimdb":
            return [*new, F.relu(fusion.gn3(e))]
        return [*new, fusion.gn3(F.relu(e))]

    @torch.no_grad()
    def forward(self, xs: list[Tensor]) -> Tensor:
        if self.layout == "brca":
            x_fuse = torch.stack(xs).sum(0)
        else:
            x_fuse = sum(w * x for w, x in zip(self.weights, xs, strict=True)) + self.bias
        z = [torch.zeros_like(x_fuse)] * (N + 1)
        for _ in range(500):
            old, z = z, self.step(z, xs, x_fuse)
        drift = max(float((a - b).abs().max()) for a, b in zip(old, z, strict=True))
        assert drift < 1e-12, "the plain joint iteration of this test must converge"
        return z[-1]


@pytest.fixture(params=LAYOUTS)
def released(request) -> ReleasedLayer:
    torch.manual_seed(0)
    layer = ReleasedLayer(request.param)
    with torch.no_grad():  # as after training with the Jacobian penalty: contractive
        *cells, fusion = layer.func_.branches
        for cell in cells:
            cell.gn3.weight.uniform_(0.05, 0.15)
            cell.conv2.weight.mul_(0.2)
        fusion.gate.weight.mul_(0.1)
        fusion.fuse.weight.mul_(0.1)
        for part in layer.modules():
            if isinstance(part, nn.GroupNorm):
                part.bias.uniform_(-0.1, 0.1)
    return layer  # float32, as the authors' files are


def variant(released: ReleasedLayer) -> str:
    return "released-mmimdb" if released.layout == "mmimdb" else "released"


def features() -> list[Tensor]:
    return list(torch.randn(N, ROWS, DIM, dtype=torch.float64))


@pytest.mark.parametrize("prefix", ["", "module.deq_fusion."], ids=["bare", "prefix"])
def test_outputs_are_those_of_the_released_iteration(released, prefix):
    state = {f"{prefix}{name}": value for name, value in released.state_dict().items()}
    if prefix:  # a whole model: what does not belong to the fusion is not looked at
        state["module.classifier.weight"] = torch.randn(2, DIM)
    fusion = DEQFusion.from_released_checkpoint(state, variant=variant(released), solver=TIGHT)
    assert fusion.dim == DIM
    assert fusion.num_modalities == N
    assert fusion.num_groups == 4
    xs = features()
    # Both converged to 1e-12, on a contractive layer.
    torch.testing.assert_close(fusion.double()(xs), released.double()(xs), rtol=0, atol=1e-10)


def test_no_weight_is_rounded_and_none_is_shared(released):
    state = released.state_dict()
    fusion = DEQFusion.from_released_checkpoint(state, variant=variant(released))
    found = dict(fusion.named_parameters())
    *cells, last = released.func_.branches
    assert torch.equal(found["cells.2.linear1.weight"], cells[2].conv1.weight)
    assert torch.equal(found["cells.0.norm3.bias"], cells[0].gn3.bias)
    assert torch.equal(found["combine.gate.weight"], last.gate.weight)
    assert torch.equal(found["combine.norm.bias"], last.gn3.bias)
    if released.layout == "brca":
        assert torch.equal(found["modality_weights"], torch.ones(N))
        assert found["injection_bias"].item() == 0
    else:
        assert torch.equal(found["modality_weights"], torch.cat(list(released.weights)))
        assert torch.equal(found["injection_bias"], released.bias[0].reshape(1))
    before = last.gate.weight.clone()
    with torch.no_grad():
        found["combine.gate.weight"].zero_()
    assert torch.equal(last.gate.weight, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_layer_has_the_dtype_of_the_checkpoint(dtype):
    released = ReleasedLayer("root").to(dtype)
    fusion = DEQFusion.from_released_checkpoint(released.state_dict(), variant="released")
    assert {p.dtype for p in fusion.parameters()} == {dtype}
    branch = released.func_.branches[0]
    assert torch.equal(fusion.get_parameter("cells.0.linear1.weight"), branch.conv1.weight)


def test_options_reach_the_layer(released):
    fusion = DEQFusion.from_released_checkpoint(
        released.state_dict(), variant=variant(released), dropout=0.1, solver=TIGHT
    )
    assert fusion.dropout == 0.1
    assert fusion.solver == TIGHT


@pytest.mark.parametrize("how", ["conv1d", "batch_norm"])
def test_mosi_is_refused_by_name(released, how):
    state = released.state_dict()
    if how == "conv1d":
        state["func_.branches.0.conv1.weight"] = torch.randn(DIM, DIM, 1)
    else:
        state["func_.branches.0.gn1.running_mean"] = torch.zeros(DIM)
    with pytest.raises(ValueError, match=r"CMU-MOSI.*Conv1d.*BatchNorm.*Remedy"):
        DEQFusion.from_released_checkpoint(state, variant="released")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            {"func_.branches.0.conv3.weight": torch.zeros(DIM, DIM)},
            "unknown key.*conv3",
            id="part",
        ),
        pytest.param(
            {"func_.branches.3.conv1.weight": torch.zeros(DIM, DIM)},
            "unknown key.*3.conv1",
            id="cell",
        ),
        pytest.param(
            {"other.func_.branches.0.conv1.weight": torch.zeros(DIM, DIM)},
            "unknown key.*other",
            id="second-prefix",
        ),
        pytest.param(
            {"func_.branches.0.conv1.weight": None}, r"missing|branches\.0", id="no-weight"
        ),
        pytest.param({"func_.branches.3.gn3.weight": None}, r"missing|branches\.3", id="no-norm"),
        pytest.param({"weights.1": None}, "3 keys 'weights.i', got 2", id="too-few-weights"),
        pytest.param(
            {"weights.3": torch.ones(1)}, "3 keys 'weights.i', got 4", id="too-many-weights"
        ),
    ],
)
def test_wrong_keys_are_refused(change, message):
    torch.manual_seed(0)
    state = dict(ReleasedLayer("root").state_dict())
    for key, value in change.items():
        if value is None:
            del state[key]
        else:
            state[key] = value
    with pytest.raises(ValueError, match=message):
        DEQFusion.from_released_checkpoint(state, variant="released")


@pytest.mark.parametrize(
    "state", [{}, {"linear.weight": torch.zeros(2, 2)}], ids=["empty", "other"]
)
def test_not_a_released_state_dict(state):
    with pytest.raises(
        ValueError, match=r"expected keys such as 'func_\.branches\.0\.conv1\.weight'"
    ):
        DEQFusion.from_released_checkpoint(state)


def test_a_path_is_not_a_state_dict():
    with pytest.raises(TypeError, match=r"state_dict: expected a mapping .* got str.*torch\.load"):
        DEQFusion.from_released_checkpoint("x.pt")


def test_the_papers_variant_has_no_released_checkpoints(released):
    """Its equations lack the skip and the bias: loading into it would change the model silently."""
    with pytest.raises(ValueError, match="variant"):
        DEQFusion.from_released_checkpoint(released.state_dict(), variant="paper")
