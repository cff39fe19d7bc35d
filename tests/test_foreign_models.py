"""Tests of lowrank.py in other code bases: readers of `weight`, wrappers, hooks, autocast, export, unusual linears."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from helpers import distance
from torch import nn
from torch.nn.utils import parametrizations, prune

from minibalora.lowrank import LowRankLinear, adapt, adapted_layers, merge, pretrained
from minibalora.variants import VARIANTS, add_penalty, after_step, before_step, use


def as_if_trained(model: nn.Module) -> nn.Module:
    """Change the factors in place as if they were trained."""
    with torch.no_grad():
        for _, layer in adapted_layers(model):
            layer.A.add_(0.1 * torch.randn_like(layer.A))
            layer.B.add_(0.1 * torch.randn_like(layer.B))
    return model


class Classifier(nn.Module):
    own_head = ("head",)

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(16, 16), nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 3))

    def forward(self, x):
        return self.head(self.body(x))


@pytest.mark.parametrize("is_teacher_first", [False, True])
def test_student_and_teacher_share_an_autocast_block(is_teacher_first):
    """Autocast caches casts of trained leaves. The teacher's head must not get the cast of the student's head."""
    torch.manual_seed(0)
    model, x = Classifier().eval(), torch.randn(5, 16)
    before = model(x)
    adapt(model, 4)
    with torch.no_grad():
        model.head[1].weight.add_(1)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        student = None if is_teacher_first else model(x)
        with pretrained(model):
            teacher = model(x)
        student = model(x) if is_teacher_first else student
    # student and teacher differ by more than 1; 0.03 allows bfloat16
    assert distance(teacher, before) < 0.03 and distance(student, expected) < 0.03


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Start a process group of one process."""
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_is_the_matrix_that_the_layer_applies(dtype):
    """torch's fast path of an encoder layer (eval mode, no gradients) reads linear1.weight."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0).to(dtype).eval()
    x = torch.randn(2, 5, 32, dtype=dtype)
    with torch.no_grad():
        before = model(x)
        as_if_trained(adapt(model, 4))
        assert {name for name, _ in adapted_layers(model)} == {"self_attn.out_proj", "linear1", "linear2"}
        student = model(x)
    with pretrained(model):
        assert distance(model(x), before) < (1e-6 if dtype == torch.float32 else 1e-2)
        assert model.linear1.weight.data_ptr() == model.linear1.W.data_ptr()
    assert distance(student, before) > 0.01 and model.linear1.weight.dtype == dtype
    model.train()  # without the fast path, each layer's forward runs
    assert distance(model(x), student) < (1e-5 if dtype == torch.float32 else 2e-2)


def test_gradients_flow_through_weight_to_the_factors():
    layer = LowRankLinear.from_linear(nn.Linear(6, 5), 2)
    nn.functional.linear(torch.randn(3, 6), layer.weight).square().sum().backward()
    assert layer.A.grad.norm() > 0 and layer.B.grad.norm() > 0 and layer.W.grad is None


@pytest.mark.parametrize("init", ["lora", "pissa"])
def test_autocast_rounds_the_update_no_more_than_a_bfloat16_model(init):
    torch.manual_seed(0)
    model = adapt(nn.Sequential(nn.Linear(256, 256, bias=False)), 8, init=init)
    half = copy.deepcopy(model)
    half[0].W.data = half[0].W.data.bfloat16()
    errors = []
    for net, dtype in ((model, torch.float32), (half, torch.bfloat16)):
        net[0].B.data += 1e-4
        x = torch.linspace(-1, 1, 256 * 300).sin().view(300, 256).bfloat16().to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            y = net(x)
            with pretrained(net):
                update = y.double() - net(x).double()
        expected = x.double() @ net[0].delta.double().T
        errors.append((update - expected).norm() / expected.norm())
        y.float().square().mean().backward()
        assert net[0].A.grad.dtype == torch.float32
    assert errors[0] < 1.3 * errors[1]


def test_the_output_may_be_modified_in_place():
    model = adapt(nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 3)), 2)
    y = model(torch.randn(5, 8))
    y += 1
    y.sum().backward()
    assert model[0].B.grad is not None


@pytest.mark.parametrize("leaf", ["bias", "W"])
def test_a_weight_or_bias_that_is_made_trainable_gets_a_gradient_and_ends_the_teacher(leaf):
    model = adapt(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), 2)
    parameter = getattr(model[0], leaf).requires_grad_()
    model(torch.randn(5, 8)).square().sum().backward()
    assert parameter.grad.norm() > 0
    with pytest.raises(ValueError, match=f"0.{leaf} is trained, but its initial value is not kept"), pretrained(model):
        pass


@pytest.mark.parametrize("wrap", ["none", "ddp", "data parallel", "fsdp2"])
def test_the_teacher_has_the_initial_head_in_wrappers_and_is_refused_if_sharded(wrap, one_process):
    x, model = torch.randn(4, 16), Classifier().eval()
    before = model(x)
    adapt(model, 2)
    assert [name for name, _ in adapted_layers(model)] == ["body"]
    model.train()(x)  # changes the running statistics of the head
    with torch.no_grad():
        model.head[1].weight.add_(1)
    if wrap == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        with (
            pytest.raises(ValueError, match="sharded"),
            pretrained(fully_shard(model, mesh=init_device_mesh("cpu", (1,)))),
        ):
            pass
        return
    wrapped = {
        "none": lambda model: model,
        "ddp": lambda model: nn.parallel.DistributedDataParallel(model),
        "data parallel": nn.DataParallel,
    }[wrap](model)
    with pretrained(wrapped):
        assert distance(wrapped(x), before) < 1e-6


def test_all_trained_parameters_of_a_head_get_gradients_and_merging_keeps_its_buffers():
    model, x = adapt(Classifier(), 2), torch.randn(4, 16)
    model(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    y = model.eval()(x)
    merge(model)
    assert distance(model(x), y) < 1e-6
    assert set(model.state_dict()) == set(Classifier().state_dict())


def test_an_adapted_model_has_no_buffers(one_process):
    """DDP sends buffers to all ranks in every forward pass."""
    assert not list(adapt(nn.Sequential(nn.Linear(8, 8)), 2).buffers())


def test_sharding_in_bfloat16_leaves_student_and_teacher_equal_at_step_0(one_process):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model, x = adapt(nn.Sequential(nn.Linear(64, 64)), 8), torch.randn(5, 64)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
    with torch.no_grad():
        student = model(x)
    with pretrained(model):
        assert torch.equal(model(x), student)


def test_merging_sharded_layers_is_refused(one_process):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(adapt(nn.Sequential(nn.Linear(8, 8)), 2), mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match="sharded: load their whole state_dict"):
        merge(model)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_train_on_sharded_weights_with_whole_factors(variant, one_process):
    """As run/sharded.py shards: only W. DoRA reads the norms of W before that."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    whole, x = use(adapt(nn.Sequential(nn.Linear(12, 9)), 3, init="lora"), variant), torch.randn(5, 12)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter += 0.1 * torch.randn_like(parameter) * parameter.requires_grad
    model = copy.deepcopy(whole)
    ignored = {parameter for parameter in model.parameters() if parameter is not model[0].W}
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)), ignored_params=ignored)
    for net in (whole, model):
        before_step(net, 0, seed=0)
        net(x).square().sum().backward()
        add_penalty(net)
        after_step(net, 1, 4)
    pairs = zip(whole.parameters(), model.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs if a.requires_grad)
    with pretrained(model), pretrained(whole):
        assert torch.equal(model(x), whole(x))


def test_a_linear_that_is_registered_twice_is_adapted_once():
    model = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)})
    model["c"] = model["a"]
    x = torch.randn(2, 6)
    as_if_trained(adapt(model, 2))
    assert model["c"] is model["a"] and len(adapted_layers(model)) == 2
    y = model["c"](x)
    assert distance(merge(model)["c"](x), y) < 1e-6 and model["c"] is model["a"] and type(model["a"]) is nn.Linear


class PlainSubclass(nn.Linear):
    pass


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Conv1D(nn.Module):
    """A linear as in transformers' GPT-2."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))


def pruned() -> nn.Module:
    return prune.random_unstructured(nn.Linear(6, 6), "weight", 0.5)


def with_pruned_bias() -> nn.Module:
    return prune.random_unstructured(nn.Linear(6, 6), "bias", 0.5)


def with_old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(nn.Linear(6, 6))


def offloaded() -> nn.Module:
    linear = nn.Linear(6, 6)
    linear.forward = lambda x: nn.Linear.forward(linear, x)
    return linear


@pytest.mark.parametrize(
    "make, kind",
    [
        (lambda: Scaled(6, 6), "Scaled"),
        (Conv1D, "Conv1D"),
        (pruned, "Linear"),
        (with_pruned_bias, "Linear"),
        (with_old_weight_norm, "Linear"),
        (lambda: parametrizations.weight_norm(nn.Linear(6, 6)), "ParametrizedLinear"),
        (lambda: parametrizations.orthogonal(nn.Linear(6, 6)), "ParametrizedLinear"),
        (offloaded, "Linear"),
        (lambda: nn.Linear(6, 6, device="meta"), "Linear"),
    ],
)
def test_a_module_that_is_not_a_plain_linear_is_refused_by_name_and_type(make, kind):
    model = nn.ModuleDict({"k": nn.Linear(6, 6), "q": make()})
    for targets in (None, "q"):
        with pytest.raises(ValueError, match=rf"^q: .*\b{kind}\b"):
            adapt(model, 2, targets=targets)
        assert not adapted_layers(model)
    assert [name for name, _ in adapted_layers(adapt(model, 2, targets="k"))] == ["k"]


def test_a_lazy_linear_is_refused():
    with pytest.raises(ValueError, match="^0: this LazyLinear"):
        adapt(nn.Sequential(nn.LazyLinear(6)), 2)


def test_a_subclass_with_the_forward_of_linear_is_adapted():
    model = nn.ModuleDict({"q": PlainSubclass(6, 6), "k": nn.Linear(6, 6)})
    assert [name for name, _ in adapted_layers(adapt(model, 2))] == ["q", "k"]


class TiedLM(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.body, self.decoder = nn.Embedding(20, 6), nn.Linear(6, 6), nn.Linear(6, 20, bias=False)
        self.decoder.weight = self.embed.weight
        self.out = nn.Linear(6, 20)

    def get_output_embeddings(self):
        return self.out


def test_tied_heads_and_output_embeddings_are_not_adapted():
    model = adapt(TiedLM(), 2)
    assert [name for name, _ in adapted_layers(model)] == ["body"] and model.decoder.weight is model.embed.weight
    for targets, message in (
        ("decoder", "decoder: there are body, and heads"),
        ("nothing", "is called nothing: there are body"),
    ):
        with pytest.raises(ValueError, match=message):
            adapt(TiedLM(), 2, targets=targets)
    with pytest.raises(ValueError, match="there are none, and heads"):
        adapt(nn.Sequential(nn.Conv2d(3, 3, 1)), 2)


def test_output_embeddings_and_tied_heads_are_not_adapted_in_wrappers():
    model = adapt(nn.DataParallel(TiedLM()), 2)
    assert [name for name, _ in adapted_layers(model)] == ["module.body"]
    bags = nn.ModuleDict(
        {"embed": nn.EmbeddingBag(20, 6), "body": nn.Linear(6, 6), "out": nn.Linear(6, 20, bias=False)}
    )
    bags["out"].weight = bags["embed"].weight
    assert [name for name, _ in adapted_layers(adapt(bags, 2))] == ["body"]


def test_own_head_may_be_one_name_keeps_float64_and_is_refused_if_names_collide():
    class Named(Classifier):
        own_head = "head"

    model = adapt(Named().double(), 2)
    assert model.head[1].weight.dtype == torch.float64 and [name for name, _ in adapted_layers(model)] == ["body"]
    model = Classifier()
    model.head[1].weight0 = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="the same name with a 0"):
        adapt(model, 2)
    assert not adapted_layers(model)


def test_hooks_buffers_and_handles_survive_adapting_and_merging():
    model, calls = nn.Sequential(nn.Linear(6, 6)), []
    model[0].register_buffer("calibration", torch.arange(3.0))
    handle = model[0].register_forward_hook(lambda module, args, y: calls.append(type(module)))
    x = torch.randn(2, 6)
    for change in (lambda: adapt(model, 2), lambda: merge(model)):
        change()
        model(x)
        assert torch.equal(model[0].calibration, torch.arange(3.0)) and "0.calibration" in model.state_dict()
    assert calls == [LowRankLinear, nn.Linear]
    handle.remove()
    model(x)
    assert len(calls) == 2


def test_the_state_dict_includes_the_scaling():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 6))
    saved, other = (adapt(copy.deepcopy(base), 2, alpha, "lora") for alpha in (32, 4))
    as_if_trained(saved)
    other.load_state_dict(saved.state_dict())
    x = torch.randn(3, 6)
    assert torch.equal(other(x), saved(x)) and other[0].scaling == 16


def test_a_gradient_penalty_has_the_right_gradient():
    torch.manual_seed(0)
    model = adapt(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 2)), 2).double()
    x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)

    def penalty(*factors):
        state = dict(zip(("0.A", "0.B", "2.A", "2.B"), factors, strict=True))
        y = torch.func.functional_call(model, state, x)
        return torch.autograd.grad(y.sum(), x, create_graph=True)[0].square().sum()

    factors = [p for name, p in model.named_parameters() if p.requires_grad]
    assert torch.autograd.gradcheck(penalty, factors)


def test_factors_ignore_the_default_dtype_and_device():
    linear = nn.Linear(6, 5)
    with torch.device("meta"):
        torch.set_default_dtype(torch.float64)
        try:
            layers = [LowRankLinear.from_linear(linear, 2, init=init) for init in ("lora", "pissa", "pissa_krylov_1")]
        finally:
            torch.set_default_dtype(torch.float32)
    for layer in layers:
        assert layer.A.dtype == torch.float32 and layer.A.device.type == "cpu"
        assert layer(torch.randn(3, 6)).shape == (3, 5)


@pytest.mark.parametrize("strict", [False, True])
def test_it_exports_with_a_dynamic_batch(strict):
    model = as_if_trained(adapt(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), 2)).eval()
    shapes = ({0: torch.export.Dim("batch", min=2, max=4096)},)
    program = torch.export.export(model, (torch.randn(3, 8),), dynamic_shapes=shapes, strict=strict)
    x = torch.randn(300, 8)
    assert distance(program.module()(x), model(x)) < 1e-6


def test_running_means_that_training_changes_end_the_teacher_unless_they_are_kept():
    def make(own_head: tuple[str, ...]) -> nn.Module:
        model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
        model.own_head = own_head
        return adapt(model, 2)

    x = torch.randn(16, 8)
    for own_head in ((), ("1",)):
        model = make(own_head)
        before = model.eval()(x)
        model.train()(3 * x + 1)
        if own_head:
            with pretrained(model):
                assert torch.equal(model(x), before)
        else:
            with pytest.raises(ValueError, match="^1 has running means"), pretrained(model):
                pass


def test_a_head_that_fsdp1_flattened_is_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    model.own_head = "1"
    adapt(model, 2)
    model[1].weight._fsdp_flattened = True  # FSDP1's own mark, which gives the parameter other data in each pass
    with pytest.raises(ValueError, match="the head in own_head is sharded"), pretrained(model):
        pass


def test_a_linear_with_a_call_of_its_own_is_refused():
    class Doubled(nn.Linear):
        def __call__(self, x):
            return 2 * super().__call__(x)

    with pytest.raises(ValueError, match="Doubled is not a plain nn.Linear"):
        adapt(nn.Sequential(Doubled(8, 8)), 2)


def test_a_symbolic_trace_computes_the_same():
    model, x = adapt(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), 2), torch.randn(3, 8)
    model[0].B.data += 0.1
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))
