"""What users of timm do to a model, with the tools of others: docs/models.md has the table."""

import copy
import io
import json
import warnings

import pytest
import timm
import torch
from commands import start
from conftest import ROOT, quick
from torch import nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.nn.utils import parametrize, prune

NARROW = dict(num_classes=5, amplitude_cooling=True, depths=(1, 4, 1, 1), group_size=(4, 4, 4, 2))
"""With padding masks and an amplitude cooling layer."""
LABELS = torch.tensor([0, 1, 2])


def network(seed: int = 0, **kwargs) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("crossformer_micro", **NARROW, **kwargs).eval()


@pytest.fixture
def images() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(3, 3, 64, 96)


def linear_layers(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if type(module) is nn.Linear]


# ---- timm's programs


@pytest.mark.slow
def test_what_timms_programs_do(digits, tmp_path):
    """Train, carry on, validate, average and export, by timm's functions in a program that knows only the name."""
    done = start(ROOT / "tests" / "as_timms_programs_do.py", digits, tmp_path, fresh=True, TORCH_BACKEND="crossformer")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) > 30
    for name in ("legacy", "dynamo"):
        assert (tmp_path / f"{name}.onnx").stat().st_size > 5e6


# ---- hooks and what else replaces a module


def test_hooks_see_the_parts_of_the_position_bias(images):
    """Of which a stage evaluates all at once where nobody looks."""
    model, seen = network(), []
    with torch.no_grad():
        expected = model(images)
        for part in model.layers[1].blocks[1].attn.pos.modules():
            part.register_forward_hook(lambda module, *_: seen.append(module))
        torch.testing.assert_close(model(images), expected)
    assert set(seen) == set(model.layers[1].blocks[1].attn.pos.modules())


def test_position_bias_of_a_replaced_part_counts(images):
    """A part of another class, an own forward and a bias that depends on the map are called and not read."""
    model = network()
    with torch.no_grad():
        expected = model(images)
        pos = model.layers[0].blocks[0].attn.pos
        pos.pos3[2] = nn.Sequential(pos.pos3[2], nn.Flatten())
        torch.testing.assert_close(model(images), expected)
        pos.forward = lambda offsets: torch.full((len(offsets), 1), 3.0)
        with_constant = model(images)
        assert not torch.allclose(with_constant, expected)
        pos.forward = lambda offsets: torch.zeros(len(offsets), 1)
        torch.testing.assert_close(model(images), with_constant)  # a constant bias takes nothing from anybody


@pytest.mark.parametrize("recomputed", ["none", "full", "selective"])
def test_hooks_of_attention_and_mlp_count_in_training(images, recomputed):
    """Here with one that doubles what comes out."""
    model = network().train()
    if recomputed != "none":
        model.set_grad_checkpointing(True, selective=recomputed == "selective")
    plain, block = model(images), model.layers[1].blocks[1]
    block.attn.register_forward_hook(lambda _, __, out: 2 * out)
    doubled = model(images)
    assert not torch.allclose(doubled, plain)
    block.mlp.register_forward_hook(lambda _, __, out: 2 * out)
    again = model(images)
    assert not torch.allclose(again, doubled)
    again.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_norms_in_single_precision_and_a_head_less(images):
    """Weights that cannot be stacked are evaluated one by one."""
    model = network().bfloat16()
    expected = model(images.bfloat16())
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.float()
    torch.testing.assert_close(model(images.bfloat16()), expected, atol=0.05, rtol=0.05)
    model = timm.create_model("crossformer_micro", num_classes=5).eval()
    attn = model.layers[1].blocks[0].attn
    attn.num_heads, attn.pos.pos3[2] = 1, nn.Linear(attn.pos.pos3[2].in_features, 1)
    assert model(images).shape == (3, 5)


class Low(nn.Module):
    """What LoRA adds to a weight."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.a = nn.Parameter(torch.randn(weight.shape[0], 1))
        self.b = nn.Parameter(torch.zeros(1, weight.shape[1]))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.a @ self.b


def test_parametrised_layers(images):
    model = network()
    layers = linear_layers(model)
    with torch.no_grad():
        expected = model(images)
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", Low(layer.weight))
    torch.testing.assert_close(model(images), expected)
    model.train()(images).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    for layer in layers:
        layer.parametrizations.weight[0].b.data.fill_(0.1)
    changed = model.eval()(images)
    assert not torch.allclose(changed, expected)
    for layer in layers:
        parametrize.remove_parametrizations(layer, "weight")
    torch.testing.assert_close(model(images), changed)


def test_pruned_layers(images):
    model = network()
    for layer in linear_layers(model):
        prune.l1_unstructured(layer, "weight", 0.3)
    sparse = model(images)
    for layer in linear_layers(model):
        prune.remove(layer, "weight")
    torch.testing.assert_close(model(images), sparse)


def test_dynamic_quantisation_of_torch(images):
    """Every linear layer, those of the position bias among them, computes with int8 weights."""
    model = network()
    with warnings.catch_warnings(action="ignore"):
        small = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    assert not linear_layers(small)
    with torch.no_grad():
        assert (small(images) - model(images)).abs().max() < 0.02 * model(images).std() + 0.02


@pytest.mark.parametrize("how", quick(["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"], []))
@pytest.mark.parametrize("name", ["crossformer_micro", "crossformerpp_small"])
def test_int8_of_torchao(name, how):
    quantization = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    model, images = timm.create_model(name, num_classes=50).eval(), torch.randn(4, 3, 64, 96)
    small = copy.deepcopy(model)
    quantization.quantize_(small, getattr(quantization, how)())
    with torch.no_grad():
        logits = model(images)
        difference = (small(images) - logits).abs().max()
    assert type(small.layers[0].blocks[0].attn.pos.pos1[2].weight) is not nn.Parameter
    assert 0 < difference < 0.02 * logits.abs().max()


# ---- gradients of each image, and many models at once


@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_each_image_are_those_of_a_loop(images, training):
    model = network().train(training)

    def loss(parameters, image, label):
        return nn.functional.cross_entropy(functional_call(model, parameters, (image[None],)), label[None])

    parameters = dict(model.named_parameters())
    with warnings.catch_warnings(action="ignore"):
        of_each = vmap(grad(loss), (None, 0, 0), randomness="different")(parameters, images, LABELS)
    for i in range(len(images)):
        model.zero_grad()
        loss(parameters, images[i], LABELS[i]).backward()
        for key, parameter in parameters.items():
            torch.testing.assert_close(of_each[key][i], parameter.grad, atol=1e-5, rtol=1e-4)


def test_an_ensemble_at_once(images):
    members = [network(seed) for seed in range(3)]
    stacked, buffers = stack_module_state(members)
    base = copy.deepcopy(members[0]).to("meta")
    with torch.no_grad():
        together = vmap(lambda p, b: functional_call(base, (p, b), (images,)))(stacked, buffers)
        torch.testing.assert_close(together, torch.stack([member(images) for member in members]))


def test_functional_calls_remember_nothing_of_each_other(images):
    """Weights that are parts of a vector, as in evolution strategies: the next vector lies where the last one lay."""
    model = network()
    shapes = {key: parameter.shape for key, parameter in model.named_parameters()}
    sizes = [shape.numel() for shape in shapes.values()]

    def answer(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        vector = nn.utils.parameters_to_vector(model.parameters()) + 0.3 * torch.randn(sum(sizes), generator=generator)
        parts = zip(shapes.items(), vector.split(sizes), strict=True)
        return functional_call(model, {key: part.view(shape) for (key, shape), part in parts}, (images,))

    with torch.no_grad():
        found = [answer(seed) for seed in range(4)]
        for seed in range(4):
            model.eval()
            assert torch.equal(found[seed], answer(seed))


def test_a_step_between_two_evaluations_counts(images):
    """Also of a fused optimizer, which does not count its writes, for a model that trains in evaluation mode."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for _ in range(2):
        model(images).square().sum().backward()
        with torch.no_grad():
            model(images)
        optimizer.step()
        with torch.no_grad():
            assert torch.equal(model(images), copy.deepcopy(model)(images))
        optimizer.zero_grad()


def test_gradients_by_the_pixels(images):
    """With trainable parameters, backwards and forwards."""
    model = network()
    images.requires_grad_()
    (expected,) = torch.autograd.grad(model(images).sum(), images)
    torch.testing.assert_close(grad(lambda x: model(x).sum())(images.detach()), expected)
    direction = torch.randn_like(expected)
    _, along = jvp(lambda x: model(x).sum(), (images.detach(),), (direction,))
    torch.testing.assert_close(along, (expected * direction).sum(), atol=1e-4, rtol=1e-4)


# ---- sharding by others


@pytest.fixture(scope="module")
def train_divided(tmp_path_factory):
    """The losses and gradient norms of five steps on two processes."""
    folder, found = tmp_path_factory.mktemp("divided"), {}

    def run(how: str, recomputed: str) -> torch.Tensor:
        if (how, recomputed) not in found:
            file = folder / "found.json"
            done = start(ROOT / "tests" / "sharded_by_others.py", how, recomputed, file, nproc=2)
            assert done.returncode == 0, done.stderr
            found[how, recomputed] = torch.tensor(json.loads(file.read_text()))
        return found[how, recomputed]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("recomputed", ["none", "full", "selective"])
@pytest.mark.parametrize("how", ["block", "blocks", "stage", "block and stage", "fsdp1"])
def test_sharded_by_blocks_and_stages(train_divided, how, recomputed):
    """FSDP2 and FSDP1 learn what DDP learns."""
    torch.testing.assert_close(train_divided(how, recomputed), train_divided("ddp", "none"), atol=2e-5, rtol=2e-5)


# ---- graphs


def test_trace_is_right_or_refuses(images):
    """It passes its own check without a word, takes any batch, and no other size."""
    model = network()
    with warnings.catch_warnings(action="error"):
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        traced = torch.jit.trace(model, images)
    more = torch.cat([images, images.flip(0)])
    with torch.no_grad():
        torch.testing.assert_close(traced(more), model(more))
        for size in ((96, 64), (64, 128), (32, 32)):
            with pytest.raises(RuntimeError, match="expand"):
                traced(torch.randn(1, 3, *size))


def test_script_is_refused_in_one_line():
    with warnings.catch_warnings(action="ignore"), pytest.raises(RuntimeError) as refused:
        torch.jit.script(network())
    assert str(refused.value) == "CrossFormer cannot be scripted: use torch.export.export or torch.jit.trace"


def test_legacy_onnx(images):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, file = network(), io.BytesIO()
    named = dict(input_names=["images"], output_names=["logits"], dynamic_axes={"images": {0: "batch"}})
    with warnings.catch_warnings(action="ignore"):
        torch.onnx.export(model, (images,), file, dynamo=False, opset_version=17, **named)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for batch in (images, images[:1]):
        (logits,) = session.run(None, {"images": batch.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(batch).detach(), atol=1e-4, rtol=0)


@pytest.mark.slow  # half a minute a graph
def test_compile_with_dynamic_sizes_makes_one_graph_for_a_kind():
    """The groups of a stage are a map whole, or they are not; nothing else asks for another graph."""
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    model = timm.create_model("crossformer_micro", num_classes=5).eval()
    compiled = torch.compile(model, dynamic=True, backend=count)
    with torch.no_grad():
        for number, size in ((1, (192, 256)), (1, (160, 160)), (1, (224, 288)), (1, (512, 320)), (2, (64, 64))):
            images = torch.randn(2, 3, *size)
            torch.testing.assert_close(compiled(images), model(images))
            assert len(graphs) == number, size


@pytest.mark.slow
def test_features_of_any_size_from_one_graph():
    """torch.export, with sides that are multiples of 32."""
    model = timm.create_model("crossformer_micro", features_only=True, depths=(1, 1, 1, 1)).eval()
    height, width = torch.export.Dim("height", min=5, max=16), torch.export.Dim("width", min=5, max=16)
    shapes = ({0: torch.export.Dim("batch"), 2: 32 * height, 3: 32 * width},)
    graph = torch.export.export(model, (torch.randn(2, 3, 192, 224),), dynamic_shapes=shapes).module()
    with torch.no_grad():
        for batch, *size in ((1, 160, 160), (2, 192, 512), (1, 512, 160), (3, 256, 256), (1, 416, 288)):
            images = torch.randn(batch, 3, *size)
            for found, expected in zip(graph(images), model(images), strict=True):
                torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


# ---- decoders, and looking inside


@pytest.mark.parametrize(
    ("decoder", "output_stride"),
    quick(
        [("DeepLabV3Plus", 16), ("DeepLabV3Plus", 8), ("DeepLabV3", 8), ("PAN", 16), ("Unet", 32), ("UnetPlusPlus", 32),
         ("FPN", 32), ("Linknet", 32), ("PSPNet", 8), ("MAnet", 32), ("UPerNet", 32), ("Segformer", 32), ("DPT", 32)],
        [("DeepLabV3Plus", 16)],
    ),
)  # fmt: skip
def test_decoders_of_segmentation_models_pytorch(decoder, output_stride):
    smp = pytest.importorskip("segmentation_models_pytorch")
    finer = dict(encoder_output_stride=output_stride) if decoder in ("DeepLabV3Plus", "DeepLabV3", "PAN") else {}
    with warnings.catch_warnings(action="ignore"):
        model = getattr(smp, decoder)("tu-crossformer_micro", encoder_weights=None, classes=3, **finer)
    masks = model(torch.randn(2, 3, 128, 192))
    assert masks.shape == (2, 3, 128, 192)
    assert model.encoder.output_stride == output_stride
    masks.mean().backward()


@pytest.mark.parametrize("method", quick(["GradCAM", "HiResCAM", "LayerCAM", "EigenCAM", "ScoreCAM"], []))
def test_maps_of_pytorch_grad_cam(images, method):
    library = pytest.importorskip("pytorch_grad_cam")
    targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
    model = network()

    def to_nchw(tokens):
        return tokens.permute(0, 3, 1, 2)

    with getattr(library, method)(model, [model.norm], reshape_transform=to_nchw) as cam:
        maps = cam(images, [targets.ClassifierOutputTarget(2)] * len(images))
    assert maps.shape == (3, 64, 96)
    assert (maps.min(), maps.max()) == (0, pytest.approx(1, abs=1e-3))


@pytest.mark.slow
def test_attributions_of_captum(images):
    """What each pixel adds to a logit sums to the difference to that of the baseline; layers are seen by hooks."""
    attr = pytest.importorskip("captum.attr")
    model = network()
    added, missing = attr.IntegratedGradients(model).attribute(images, target=1, return_convergence_delta=True)
    assert added.shape == images.shape
    assert missing.abs().max() < 1e-3
    for layer in (model.layers[2].blocks[0], model.layers[3].blocks[0].attn, model.norm):
        maps = attr.LayerGradCam(model, layer).attribute(images, target=1, attr_dim_summation=False)
        assert maps.shape[0] == len(images)
        assert maps.abs().max() > 0
