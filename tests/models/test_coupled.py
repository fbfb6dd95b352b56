import pytest
import torch
from torch import Tensor, nn

from compress.models.coupled import find_coupled


class Joined(nn.Module):
    """left and right are concatenated and added to skip, which ties half of skip to each."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.skip = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(3, 10, 1)
        self.norm, self.depthwise = nn.BatchNorm2d(10), nn.Conv2d(10, 10, 3, groups=10)
        self.head = nn.Linear(10 * 4, 2)

    def forward(self, images: Tensor) -> Tensor:
        both = torch.cat([self.left(images), self.right(images)], dim=1) + self.skip(images)
        return self.head(self.depthwise(self.norm(both)).flatten(1))


def test_concatenation_ties_each_layer_to_its_own_part() -> None:
    sets, whole = find_coupled(Joined(), 4)
    assert whole == []
    by_producer = {name: coupled for coupled in sets for name in ("left", "right") if name in coupled.producers}
    assert len(sets) == 2
    left, right = by_producer["left"], by_producer["right"]
    assert (left.units, right.units) == (4, 6)
    for coupled, name, offset in ((left, "left", 0), (right, "right", 4)):
        own = coupled.places[name, "outputs"][:, 0]
        for other in ("skip", "norm", "depthwise"):
            assert torch.equal(coupled.places[other, "outputs"][:, 0], own + offset)
        # Flattening turns a channel of 2 x 2 pixels into 4 inputs.
        assert torch.equal(coupled.places["head", "inputs"], (own + offset)[:, None] * 4 + torch.arange(4))


def test_channels_of_the_output_are_in_no_set() -> None:
    head = nn.Conv2d(8, 2, 1)
    module = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), head, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    sets, _ = find_coupled(module, 4)
    assert [set(coupled.places) for coupled in sets] == [{("0", "outputs"), ("2", "inputs")}]


def test_a_grouped_convolution_loses_a_channel_of_each_group() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 1, groups=4), nn.Flatten(), nn.Linear(12 * 16, 2))
    sets, _ = find_coupled(module, 4)
    before, after = sorted(sets, key=lambda coupled: coupled.producers)
    assert before.places["1", "inputs"].tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert after.places["1", "outputs"].tolist() == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]


@pytest.mark.parametrize(
    "reader",
    [
        nn.GroupNorm(2, 8),
        nn.Conv2d(8, 4, 1, groups=4),  # one output per group, which is not depthwise
    ],
)
def test_what_cannot_be_sliced_is_left_whole(reader: nn.Module) -> None:
    width = 4 if isinstance(reader, nn.Conv2d) else 8
    module = nn.Sequential(nn.Conv2d(3, 8, 1), reader, nn.Flatten(), nn.Linear(width * 16, 2))
    sets, whole = find_coupled(module, 4)
    assert sets == []
    assert whole
    assert all(sentence.split()[0] in "01" for sentence in whole)


def test_the_module_stays_as_it_is() -> None:
    module = Joined()
    module.left.requires_grad_(False)
    module.train()
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    with torch.no_grad():
        find_coupled(module, 4)
    assert module.training
    assert not module.left.weight.requires_grad
    assert module.right.weight.requires_grad
    assert all(torch.equal(tensor, before[key]) for key, tensor in module.state_dict().items())


class Hierarchical(nn.Module):
    """Parts of one layer's outputs, each added to what was made of the one before: Res2Net (arXiv:1904.01169)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.split, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1)
        self.parts = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        *given, rest = torch.split(torch.relu(self.split(self.stem(images))), 4, 1)
        made = [torch.relu(self.parts[0](given[0]))]
        for layer, part in zip(self.parts[1:], given[1:], strict=True):
            made.append(torch.relu(layer(made[-1] + part)))
        return self.head(self.last(torch.cat([*made, rest], 1)).mean((2, 3)))


def test_channels_that_nobody_is_said_to_have_are_no_set() -> None:
    sets, whole = find_coupled(Hierarchical().eval(), 16)
    assert {coupled.name for coupled in sets} == {"stem", "last"}
    assert all(coupled.units == 8 for coupled in sets)
    assert any("split keeps all its channels" in sentence for sentence in whole)
