"""Run `FeatureKD()` on the models of timm and torchvision: `python tests/sweep_vision.py [name ...]`.

Run by hand, in a separate environment (`pip install torch==2.14.1 torchvision==0.29.1 timm einops jaxtyping`, with
`src` in PYTHONPATH); it prints the tables of docs/models.md. No weights are loaded. Each pair takes one step as a
newcomer would write it. If kdloss refuses it, the pair takes the step again with the setting that the error names, at
most three times.

A row is "right" if the feature loss equals one computed separately, from plain hooks and in float64, and if the blocks
are the model's trunk: they run once and in order, the logits depend on the picture only through each compared block
(if its output is detached, they no longer depend on it), and the blocks reach from the first third of the layers that
run to the last third. A layout that an error names must be that of the blocks: the axis of the channels keeps its size
when the picture grows. Every other result except a refusal is a fault, which is printed in capitals.
"""

import re
import sys
import warnings

import torch

import kdloss
from kdloss.layers import find_blocks

TIMM = """
resnet18 resnet50, resnetv2_50 resnetv2_50, resnext50_32x4d resnext50_32x4d, seresnet50 seresnet50,
res2net50_26w_4s res2net50_26w_4s, tresnet_m tresnet_m, convnext_atto convnext_femto,
convnextv2_atto convnextv2_femto, efficientnet_b0 efficientnet_b2, tf_efficientnetv2_b0 tf_efficientnetv2_b1,
mobilenetv2_050 mobilenetv2_100, mobilenetv3_small_050 mobilenetv3_small_100,
mobilenetv4_conv_small mobilenetv4_conv_small, mnasnet_small mnasnet_small, tinynet_e tinynet_d,
hardcorenas_a hardcorenas_b, ghostnet_050 ghostnet_100, rexnet_100 rexnet_130, regnetx_002 regnetx_004,
vgg11_bn vgg13_bn, densenet121 densenet169, dla34 dla60, dpn68 dpn68, hrnet_w18_small hrnet_w18_small,
inception_v3 inception_v3, inception_v4 inception_v4, inception_resnet_v2 inception_resnet_v2,
xception41 xception41, repvgg_a0 repvgg_a1, nfnet_l0 nfnet_l0, ese_vovnet19b_dw ese_vovnet19b_dw,
cspresnet50 cspresnet50, cspdarknet53 cspdarknet53, darknet53 darknet53, selecsls42 selecsls42,
vit_tiny_patch16_224 vit_small_patch16_224, deit_tiny_patch16_224 deit_small_patch16_224,
deit3_small_patch16_224 deit3_small_patch16_224, beit_base_patch16_224 beit_base_patch16_224,
eva02_tiny_patch14_224 eva02_small_patch14_224, cait_xxs24_224 cait_xs24_384,
swin_tiny_patch4_window7_224 swin_base_patch4_window7_224, swinv2_cr_tiny_224 swinv2_cr_small_224,
pit_ti_224 pit_xs_224, levit_128s levit_192, mixer_s32_224 mixer_b32_224, resmlp_12_224 resmlp_24_224,
gmlp_ti16_224 gmlp_s16_224, convmixer_768_32 convmixer_768_32, poolformer_s12 poolformer_m36,
coatnet_0_224 coatnet_0_224, maxvit_tiny_tf_224 maxvit_tiny_tf_224, efficientformer_l1 efficientformer_l3,
efficientformerv2_s0 efficientformerv2_s1, mobilevit_xxs mobilevit_xs, mobilevitv2_050 mobilevitv2_075,
fastvit_t8 fastvit_t12, davit_tiny davit_tiny, focalnet_tiny_srf focalnet_base_srf, hiera_tiny_224 hiera_base_224,
edgenext_xx_small edgenext_x_small, mvitv2_tiny mvitv2_tiny, sequencer2d_s sequencer2d_s, volo_d1_224 volo_d1_224,
xcit_nano_12_p16_224 xcit_tiny_12_p16_224, crossvit_tiny_240 crossvit_small_240, twins_svt_small twins_svt_base,
pvt_v2_b0 pvt_v2_b1, tiny_vit_5m_224 tiny_vit_11m_224
"""
TORCHVISION = """
alexnet alexnet, vgg11 vgg13, resnet18 resnet34, resnext50_32x4d resnext50_32x4d, convnext_tiny convnext_base,
efficientnet_b0 efficientnet_b2, efficientnet_v2_s efficientnet_v2_s, mobilenet_v2 mobilenet_v2,
mobilenet_v3_small mobilenet_v3_large, densenet121 densenet161, inception_v3 inception_v3, googlenet googlenet,
shufflenet_v2_x0_5 shufflenet_v2_x1_0, squeezenet1_0 squeezenet1_1, mnasnet0_5 mnasnet1_0,
regnet_x_400mf regnet_x_800mf, swin_t swin_b, swin_v2_t swin_v2_b, vit_b_32 vit_b_32, maxvit_t maxvit_t
"""
HINTS = {  # in errors: the settings that they name
    "blocks": r"blocks='([^']+)'",
    "pairing": r"pairing='(resolution)'",
    "resize": r"resize=kdloss\.resize\.(pool)",
    "layout": r"layout='([^']+)'",
    "take": r"take=torch\.(clone)",
}


def pairs(text):
    return [tuple(pair.split()) for pair in text.replace("\n", " ").split(",")]


def build(source, name, size):
    """A random model for five classes."""
    if source == "torchvision":
        import torchvision

        more = {"aux_logits": False, "init_weights": False} if name in ("inception_v3", "googlenet") else {}
        return torchvision.models.get_model(name, weights=None, num_classes=5, **more)
    import timm

    return timm.create_model(name, num_classes=5, **({"img_size": size} if size else {}))


def picture_size(source, *names):
    """The picture size that both models need; None if any size works."""
    if source == "torchvision":
        return 224 if any(n.startswith(("vit", "swin", "maxvit")) for n in names) else None
    import timm

    wants = [timm.get_pretrained_cfg(n, allow_unregistered=True) for n in names]
    fixed = [w.input_size[-1] for w in wants if w is not None and w.fixed_input_size]
    return max(fixed, default=None)


def step(student, teacher, x, settings):
    """Take a newcomer's step; return the term, its loss, and the outputs of both models' blocks from plain hooks."""
    criterion = kdloss.FeatureKD(**settings)
    distill = kdloss.Distiller(teacher, criterion).prepare(student, x)
    seen = {}
    handles = [
        block.register_forward_hook(lambda m, a, y, key=(side, i): seen.setdefault(key, []).append(first(y)))
        for side, model in (("student", student), ("teacher", teacher))
        for i, block in enumerate(find_blocks(model, settings.get("blocks")))
    ]
    try:
        out = distill(student, x, labels=torch.zeros(len(x), dtype=torch.long))
    finally:
        for handle in handles:
            handle.remove()
    out.loss.backward()
    return criterion.terms["feature"], out.components["feature"].double(), seen


def first(output):
    """A copy of a block's output, the first tensor of a tuple, before a later layer can change it in place."""
    if isinstance(output, tuple):
        output = next(y for y in output if isinstance(y, torch.Tensor))
    if not isinstance(output, torch.Tensor):
        raise Fault(f"a block gives a {type(output).__name__}, and it was compared")
    return output.detach().clone()


def expected(term, seen, settings):
    """The mean over pairs of the mean squared error, after the term's own projections, in float64."""
    total = 0.0
    chosen = term.layer_map.pairs()
    for s, t, weight in chosen:
        (a,), (b,) = seen["student", s], seen["teacher", t]
        if settings.get("resize") is not None:
            a, b = settings["resize"](a, b)
        axis = [i for i, (n, m) in enumerate(zip(a.shape, b.shape, strict=True)) if n != m]
        if len(axis) > 1:
            raise Fault(f"features {tuple(a.shape)} and {tuple(b.shape)} differ in several axes and were compared")
        a, b = a.double(), b.double()
        if axis:
            project = term.projections[str(s)]
            a, b = a.movedim(axis[0], -1), b.movedim(axis[0], -1)
            a = a @ project.weight.detach().double().T + project.bias.detach().double()
        total = total + weight * (a - b).square().mean()
    return total, [s for s, _, _ in chosen]


class Fault(Exception):
    """A result that must not happen."""


def look_at_trunk(model, blocks, compared, x, named):
    """Raise unless the blocks are the trunk, see above. A list that an error named may be a part of the trunk."""
    model.eval()
    order, handles = [], []
    for module in model.modules():
        if module in set(blocks) or (not any(True for _ in module.children()) and weighs(module)):
            handles.append(module.register_forward_hook(lambda m, a, y: order.append(m)))
    model(x)
    for handle in handles:
        handle.remove()
    ran = [order.index(block) for block in blocks]
    if any(order.count(block) != 1 for block in blocks) or ran != sorted(ran):
        raise Fault("its blocks run several times or in another order")
    layers = [m for m in order if m not in set(blocks)]
    inside = [i for i, m in enumerate(layers) if any(m in set(b.modules()) for b in blocks)]
    if inside and not named and (inside[0] > len(layers) / 3 or inside[-1] < len(layers) * 2 / 3):
        raise Fault(f"its blocks hold layers {inside[0]} to {inside[-1]} of {len(layers)}")
    for i in compared:
        handle = blocks[i].register_forward_hook(lambda m, a, y: cut(y))
        z = x.clone().requires_grad_()
        out = model(z)
        handle.remove()
        past = (out * torch.randn_like(out)).sum()
        if out.requires_grad and torch.autograd.grad(past, z, allow_unused=True)[0] is not None:
            raise Fault(f"the logits see the picture past block {i}")


def channels(model, block, x):
    """The axis of a map's channels: the one that stays when the picture grows; None for models of a fixed size."""
    shapes = []
    handle = block.register_forward_hook(lambda m, a, y: shapes.append(first(y).shape))
    try:
        with torch.no_grad():
            model.eval()(x), model(torch.cat([torch.cat([x, x], 2)] * 2, 3))
    except Exception:
        return None
    finally:
        handle.remove()
    stays = [i for i, (small, large) in enumerate(zip(*shapes, strict=True)) if i and small == large]
    return stays[0] if len(stays) == 1 else None


def look_at_layout(model, blocks, compared, x, layout):
    """How a layout that an error named differs from that of the blocks; None if it doesn't."""
    for i in compared:
        axis = channels(model, blocks[i], x)
        if axis is not None and layout.split()[axis] != "c":
            return f"the channels of block {i} are axis {axis}"
    return None


def weighs(module):
    return any(p.ndim > 1 for p in module.parameters(recurse=False))


def cut(output):
    """An output, detached from the graph."""
    if isinstance(output, torch.Tensor):
        return output.detach()
    return type(output)(map(cut, output)) if isinstance(output, tuple | list) else output


def verdict(source, names):
    """The result of a pair: the outcome, the settings or the reason, and the numbers of blocks."""
    size, settings, refused = picture_size(source, *names), {}, ""
    try:
        torch.manual_seed(0)
        student, teacher = (build(source, name, size if source == "timm" else None) for name in names)
        x = torch.randn(2, 3, size or 128, size or 128)
        student.eval()(x), teacher.eval()(x)
    except Exception as error:
        return "unsupported", f"it does not run: {error}"[:90], ""
    for _ in range(4):
        try:
            student.train()
            torch.manual_seed(1)
            term, loss, seen = step(student, teacher, x, settings)
            wanted, compared = expected(term, seen, settings)
            torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-6)
            blocks = list(find_blocks(student, settings.get("blocks")))
            look_at_trunk(student, blocks, compared, x, "blocks" in settings)
            if "layout" in settings and (wrong := look_at_layout(student, blocks, compared, x, settings["layout"])):
                return "TOLD WRONG", f"{written(settings)}; {wrong}", ""
            depth = f"{len(blocks)}, {len(find_blocks(teacher, settings.get('blocks')))}"
            return ("right" if not settings else "refused, right as told"), written(settings), depth
        except (ValueError, TypeError, RuntimeError) as error:
            if "kdloss" not in (error.__traceback__ and innermost(error)):
                return "CRASH", f"{type(error).__name__}: {error}"[:200], ""
            refused = str(error)
            told = next(
                ((k, m[1]) for k, p in HINTS.items() if k not in settings and (m := re.search(p, refused))), None
            )
            if told is None:
                return "refused", refused[:160].replace("|", "/"), ""
            settings[told[0]] = {"clone": torch.clone, "pool": kdloss.resize.pool}.get(told[1], told[1])
            if told[0] == "layout" and (at := re.search(r"(?:student|teacher) block (\d+)", refused)):
                blocks = list(find_blocks(student, settings.get("blocks")))
                if int(at[1]) < len(blocks) and (wrong := look_at_layout(student, blocks, [int(at[1])], x, told[1])):
                    return "TOLD WRONG", f"{written(settings)}; {wrong}", ""
        except Exception as error:
            return "SILENT", f"{written(settings)} {type(error).__name__} {error}"[:200].replace("\n", " "), ""
    return "refused", refused[:160].replace("|", "/"), ""


def innermost(error):
    """The file that raised."""
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_code.co_filename


def written(settings):
    names = {torch.clone: "torch.clone", kdloss.resize.pool: "kdloss.resize.pool"}
    return ", ".join(f"`{k}={names.get(v, repr(v))}`" for k, v in settings.items())


def tables(rows):
    """The page's tables of vision models, from rows: source, student, teacher, outcome, settings or reason, blocks."""
    parts = {
        "right": ("Right", '??? success "{}"', "| model | teacher | blocks |"),
        "refused, right as told": ("Right with a setting", None, "| model | teacher | add | blocks |"),
        "refused": ("Refused by default", None, "| model | teacher | why |"),
    }
    for outcome in dict.fromkeys(row[3] for row in rows):
        parts.setdefault(outcome, (outcome, None, "| model | teacher | why | blocks |"))  # a fault
    lines = []
    for outcome, (title, closed, head) in parts.items():
        body = [
            "| " + " | ".join([f"{source} `{student}`", f"`{teacher}`", *(x for x in (why, blocks) if x)]) + " |"
            for source, student, teacher, what, why, blocks in rows
            if what == outcome
        ]
        if body:
            body = [head, "|---" * (head.count("|") - 1) + "|", *body]
            if closed:
                body = [closed.format(f"{len(body) - 2} pairs"), "", *(f"    {line}" for line in body)]
            lines += [f"#### {title}", "", *body, ""]
    return "\n".join(lines)


def main(chosen):
    warnings.simplefilter("ignore")
    rows = []
    for source, text in (("timm", TIMM), ("torchvision", TORCHVISION)):
        for names in pairs(text):
            if not chosen or source in chosen or names[0] in chosen:
                rows.append((source, *names, *verdict(source, names)))
                print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
    print(tables(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
