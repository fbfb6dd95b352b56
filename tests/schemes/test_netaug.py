import copy
from dataclasses import replace

import networks
import pytest
import torch
from networks_taught import digest, pruned, stage, without_dropout
from torch import Tensor, nn

from compress.errors import ModelError
from compress.models.coupled import find_coupled
from compress.models.structure import resize, select
from compress.observation import observe
from compress.product import KeptChannels, Network, Preprocess, Product, Structure
from compress.schemes.netaug import Augmented, NetAug, augment, extras, kept_maps, kept_since, positions
from compress.stages.export import Export
from compress.stages.quantize import Quantize
from compress.teaching import objective

NAMES = ["squeezenet", "regnet_x", "densenet"]


def shrunk(name: str, run) -> tuple[Product, Augmented, Tensor]:
    """A network right after pruning: what is left has its old weights and statistics. All in float64."""
    size = networks.size_of(name)
    images = networks.images_of(8, size)
    module = networks.settle(networks.NETWORKS[name](10), images)
    structure = Structure(model={"use": "tests:none"}, num_classes=10, preprocess=Preprocess(size=size))
    data = copy.copy(run.data)
    data.preprocess = structure.preprocess
    product = pruned(Product(Network(module, structure)), replace(run, data=data), 0.6, batchnorm_images=0)
    augmented = augment(product, size).eval()
    for network in (product.network.module, product.parent.module, augmented):
        network.double()
    return product, augmented, images.double()


def with_the_students_statistics(augmented: Augmented, product: Product) -> None:
    """Puts the student's BatchNorm statistics where the augmented network has its own of the same channels."""
    places = positions(product.parent.module, product.network.structure.kept)
    mine = dict(product.network.module.named_buffers())
    for name, buffer in augmented.wide.network.named_buffers():
        buffer.flatten()[places[name].flatten()] = mine[name].flatten()


@pytest.mark.parametrize("name", NAMES)
def test_without_extra_channels_it_is_the_student_and_with_all_the_original(run, name):
    product, augmented, images = shrunk(name, run)
    student, parent = product.network.module, product.parent.module
    with torch.no_grad():
        with_all = augmented(student, images, [1.0] * len(augmented.extras)).logits_NK
        torch.testing.assert_close(with_all, parent(images), rtol=1e-12, atol=1e-12)
        # Another student than what pruning left, and other statistics.
        generator = torch.Generator().manual_seed(1)
        for tensor in (*student.parameters(), *(b for b in student.buffers() if b.is_floating_point())):
            tensor.mul_(1 + 0.2 * torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype))
        with_the_students_statistics(augmented, product)
        without = augmented(student, images, [0.0] * len(augmented.extras)).logits_NK
        torch.testing.assert_close(without, student(images), rtol=1e-9, atol=1e-9)
        half = augmented(student, images, [0.5] * len(augmented.extras)).logits_NK
        assert not torch.allclose(half, without)
        assert not torch.allclose(half, with_all)


def test_a_width_between_is_a_network_pruned_less(run):
    """Removing what `widths` leaves out gives the same logits: absent channels are not computed with, but gone."""
    product, augmented, images = shrunk("mobilenet_v2", run)
    augmented.sort(product.network.module)
    widths = [index % 3 / 2 for index in range(len(augmented.extras))]
    with torch.no_grad():
        found = augmented(product.network.module, images, widths).logits_NK
    gone: dict[tuple[str, str], set[int]] = {}
    sets = iter(zip(augmented.extras, widths, strict=True))
    kept = product.network.structure.kept
    for coupled in find_coupled(copy.deepcopy(product.parent.module).float(), images.shape[-1])[0]:
        name = coupled.producers[0]
        if name not in kept or kept[name].outputs is None:
            continue
        extra, width = next(sets)
        for place, channels in coupled.places.items():
            absent = extra.units[round(width * len(extra.units)) :]
            gone.setdefault(place, set()).update(channels[absent].flatten().tolist())
    layers = dict(product.parent.module.named_modules())
    wider: dict[str, KeptChannels] = {}
    for name in {name for name, _ in gone}:
        layer = layers[name]
        outputs = set(range(layer.weight.shape[0])) - gone.get((name, "outputs"), set())
        if getattr(layer, "groups", 1) > 1:
            channels = tuple(sorted(outputs))
            wider[name] = KeptChannels(outputs=channels, inputs=channels, groups=len(channels))
        elif layer.weight.ndim == 1:
            wider[name] = KeptChannels(outputs=tuple(sorted(outputs)))
        else:
            inputs = set(range(layer.weight.shape[1])) - gone.get((name, "inputs"), set())
            wider[name] = KeptChannels(outputs=tuple(sorted(outputs)), inputs=tuple(sorted(inputs)))
    module = copy.deepcopy(product.parent.module)
    resize(module, wider)
    assert sum(p.numel() for p in product.network.module.parameters()) < sum(p.numel() for p in module.parameters())
    assert sum(p.numel() for p in module.parameters()) < sum(p.numel() for p in product.parent.module.parameters())
    with torch.no_grad():
        torch.testing.assert_close(found, module(images), rtol=1e-9, atol=1e-9)


def test_positions_say_where_pruning_left_each_value(run):
    product, _, _ = shrunk("regnet_x", run)
    parent, kept = product.parent.module, product.network.structure.kept
    state = dict(parent.state_dict())
    expected = select(parent, kept)
    for name, places in positions(parent, kept).items():
        assert torch.equal(state[name].flatten()[places.flatten()].view(places.shape), expected[name]), name


def test_gradients_reach_the_student_and_the_channels_that_are_there(product, run):
    student = pruned(product, run)
    module = copy.deepcopy(student.network.module)
    augmented = augment(student, 16).train()
    images = next(iter(run.data.batches("train", batch_size=16))).images_NCHW
    statistics = {name: buffer.clone() for name, buffer in module.named_buffers()}
    own = {name: buffer.clone() for name, buffer in augmented.named_buffers()}

    augmented(module, images, [1.0] * len(augmented.extras)).logits_NK.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())
    trained = {name: p for name, p in augmented.wide.network.named_parameters() if p.requires_grad}
    assert trained
    for name, parameter in trained.items():
        gradient = parameter.grad.flatten().clone()
        covered = augmented.places[name].flatten()
        assert not gradient[covered].any(), name
        gradient[covered] = 1
        assert gradient.any(), name
    # Statistics move in the augmented network and nowhere else.
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in module.named_buffers())
    assert any(not torch.equal(buffer, own[name]) for name, buffer in augmented.named_buffers())

    augmented.zero_grad()
    augmented(module, images, [0.0] * len(augmented.extras)).logits_NK.square().sum().backward()
    for extra in augmented.extras:
        for name, rows in extra.readers.items():
            assert not trained[name].grad.flatten()[rows[extra.units].flatten()].any()


def test_extra_channels_come_in_the_order_of_the_weights_that_read_them(product, run):
    student = pruned(product, run)
    augmented = augment(student, 16)
    before = [set(extra.units.tolist()) for extra in augmented.extras]
    augmented.sort(student.network.module)
    state = student.parent.module.state_dict()
    for extra, units in zip(augmented.extras, before, strict=True):
        assert set(extra.units.tolist()) == units
        read = [
            sum(state[name].flatten()[rows[unit]].abs().sum().item() for name, rows in extra.readers.items())
            for unit in extra.units.tolist()
        ]
        assert read == pytest.approx(sorted(read, reverse=True))
        assert len(read) > 1


def test_kept_since_counts_by_the_parents_channels():
    student = {"a": KeptChannels(outputs=(1, 5), inputs=(0,)), "b": KeptChannels(outputs=(2,))}
    parent = {"a": KeptChannels(outputs=(1, 3, 5))}
    expected = {"a": KeptChannels(outputs=(0, 2), inputs=(0,)), "b": KeptChannels(outputs=(2,))}
    assert kept_since(student, parent) == expected
    assert kept_since(student, {}) == student
    for lost in ((1, 3), (5,)):
        with pytest.raises(ModelError, match="layer a has channels that its parent has lost"):
            kept_since(student, {"a": KeptChannels(outputs=lost)})
    with pytest.raises(ModelError, match="layer b has channels"):
        kept_since({"b": KeptChannels(inputs=(0,))}, {"b": KeptChannels(outputs=(1,))})


def test_maps_are_cut_to_the_students_channels(product, run):
    student = pruned(product, run)
    module, layers = student.network.module, ("point", "down")
    augmented = augment(student, 16).eval()
    kept = kept_maps(student.network, student.parent, layers)
    images = next(iter(run.data.batches("train", batch_size=4))).images_NCHW
    with_the_students_statistics(augmented, student)
    maps = augmented(module, images, [0.0] * len(augmented.extras), layers).maps
    mine = observe(module, images, layers).maps
    assert any(index is not None for index in kept.values())
    for name in layers:
        whole = maps[name] if kept[name] is None else maps[name][:, kept[name]]
        torch.testing.assert_close(whole, mine[name], rtol=1e-4, atol=1e-5)


def test_a_step_is_the_students_loss_and_that_of_the_wider_network(product, run):
    student = without_dropout(pruned(without_dropout(product), run))
    module = copy.deepcopy(student.network.module).train()
    goal = objective(stage(None, labels=1.0, losses=({"use": "kd"},)), student, run, student=module)
    augmented = augment(student, 16).train()
    batch = next(iter(run.data.batches("train", batch_size=16)))
    scheme = NetAug(use="netaug", weight=0.5)
    widths = [1.0] * len(augmented.extras)
    found = scheme.step(goal, augmented, {}, module, batch, widths)
    own = goal.loss(module, batch)
    wider = goal.judge(augmented(module, batch.images_NCHW, widths), batch, module)
    torch.testing.assert_close(found, own + 0.5 * wider)
    late = replace(batch, progress=0.5)
    torch.testing.assert_close(scheme.step(goal, augmented, {}, module, late, widths), own)


def test_from_a_recipe_the_student_comes_back_in_its_own_shape(product, run):
    student = pruned(product, run)
    before, parents = digest(student.network.module), digest(student.parent.module)
    losses = [{"use": "kd"}, {"use": "fitnets", "layers": ["point", "down"]}]
    result = stage({"use": "netaug"}, epochs=2, losses=losses).apply(student, run)
    assert digest(student.network.module) == before
    assert digest(student.parent.module) == parents
    assert digest(result.network.module) != before
    assert result.network.structure == student.network.structure
    assert list(result.network.module.state_dict()) == list(student.network.module.state_dict())
    assert result.metrics["scheme"] == "netaug"
    assert Export(use="export").apply(result, run).files


def test_without_weight_nothing_changes(product, run):
    """Same batches, same steps: bit by bit what the stage trains without the scheme."""
    student = without_dropout(pruned(product, run))
    plain = stage(None, epochs=2).apply(student, run)
    silent = stage({"use": "netaug", "weight": 0.0}, epochs=2).apply(student, run)
    helped = stage({"use": "netaug"}, epochs=2).apply(student, run)
    assert digest(plain.network.module) == digest(silent.network.module) != digest(helped.network.module)


def test_widths_are_drawn_from_both_ends_and_between():
    scheme = NetAug(use="netaug", widths=4)
    drawn = scheme.draw(500, torch.Generator().manual_seed(0))
    assert set(drawn) == {0.0, 0.25, 0.5, 0.75, 1.0}


def test_what_cannot_be_widened_is_refused(product, run):
    with pytest.raises(ModelError, match="nothing was taken out of the network"):
        stage({"use": "netaug"}).apply(product, run)
    student = pruned(product, run)
    quantized = Quantize(use="quantize", epochs=0, calibration_images=16).apply(student, run)
    with pytest.raises(ModelError, match="already quantized"):
        stage({"use": "netaug"}).apply(quantized, run)
    other = copy.deepcopy(student.network.module)
    other.head = nn.Sequential(nn.Linear(other.head.in_features, 2), nn.Linear(2, 5))
    changed = replace(student, network=Network(other, student.network.structure))
    with pytest.raises(ModelError, match=r"head\.0\.weight is not what pruning left"):
        augment(changed, 16)


def test_sets_kept_in_part_are_refused(product, run):
    kept = dict(pruned(product, run).network.structure.kept)
    name = next(name for name in ("point", "down") if name in kept and kept[name].inputs)
    kept[name] = kept[name].model_copy(update={"inputs": kept[name].inputs[1:]})
    with pytest.raises(ModelError, match=r"kept other channels than the layers that it belongs to"):
        extras(product.network.module, kept, 16)
