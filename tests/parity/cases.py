"""Clips and plans on which the reference decides firmly, and both ways."""
# pyright: reportMissingImports=false

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from training.loss_fns import dice_loss, sigmoid_focal_loss

from sam2_jax.types import Batch, PromptPlan
from tests.parity import reference, tolerances
from tests.parity.rollout import Run, float64, train_forward
from tests.parity.rounding import reordered

ATTEMPTS = 40  # clips
ROUNDS = 8  # of tuning the heads to one clip
LEAST = 0.1  # share of present and of absent objects


class Case(NamedTuple):
    """How many frames, which prompts (arguments of `make_plan`), which objects are real."""

    frames: int
    plan: dict
    valid: list[list[int]]  # videos x objects


@dataclasses.dataclass
class Chosen:
    """A clip, the reference's weights for it, and its runs in float32 and float64.

    All runs are without graphs for gradients, of which a search would build one after another.
    """

    batch: Batch
    plan: PromptPlan
    model: reference.Reference
    exact_model: reference.Reference
    run: Run
    exact: Run
    others: list[Run | None] = dataclasses.field(default_factory=list)

    def runs(self) -> Iterator[Run]:
        """In float32 as it is, then in other orders of summation, as needed."""
        yield self.run
        for i in range(tolerances.ORDERS):
            if i == len(self.others):
                with torch.no_grad():
                    self.others.append(self.in_order(i))
            if other := self.others[i]:
                yield other

    def in_order(self, i: int, use: Callable[[Run], Any] = lambda run: run) -> Any | None:
        """`use` of it in float32 in one of its orders of summation.

        None if it takes another decision.
        """
        with reordered(i):
            run = train_forward(self.model, self.batch, self.plan, self.run.drawn)
            return use(run) if is_firm(run, self.exact, self.batch, times=1.0) else None


def make_plan(t: int, cond=(0,), corrected=(), box=(), points=False, from_truth=()) -> PromptPlan:
    """A plan from lists of frames; `from_truth` of (frame, correction)."""

    def marks(frames):
        return np.isin(np.arange(t), frames)

    truth = np.zeros((t, reference.CORRECTIONS), bool)
    for at in from_truth:
        truth[at] = True
    order = [*sorted(cond), *(i for i in range(t) if i not in cond)]
    return PromptPlan(
        order=np.array(order, np.int32),
        use_points=np.array(points),
        is_cond=marks(cond),
        is_box=marks(box),
        is_corrected=marks(corrected),
        from_truth=truth,
    )


def make_batch(rng: np.random.Generator, t: int, valid: np.ndarray, side: int) -> Batch:
    """Coloured squares in which rectangles move; the last object is absent in some frames."""
    b, o = valid.shape
    masks = np.zeros((b, t, o, side, side), bool)
    images = rng.uniform(0, 255, (b, t, 8, 8, 3)).repeat(side // 8, 2).repeat(side // 8, 3)
    for i in np.ndindex(b, o):
        y, x = rng.integers(side // 16, side // 2, 2)
        h, w = rng.integers(side // 8, side // 2, 2)
        dy, dx = rng.integers(-side // 20, side // 20 + 1, 2)
        colour = rng.uniform(0, 255, 3)
        for k in range(t):
            top, left = max(y + k * dy, 0), max(x + k * dx, 0)
            place = (i[0], k, slice(top, top + h), slice(left, left + w))
            masks[i[0], k, i[1], top : top + h, left : left + w] = True
            images[place] = (images[place] + colour) / 2
    masks[:, 1::3, -1] = False
    masks &= valid[:, None, :, None, None]
    images += rng.normal(0, 20, images.shape)
    return Batch(images.clip(0, 255).astype(np.uint8), masks, valid)


def clips(base: reference.Reference, case: Case, seed: int, side: int) -> Iterator[Chosen]:
    """Random clips on which the reference decides as firmly as `tolerances` asks for.

    The weights are `base` with the last layers of its heads adjusted to the clip (see `tune`):
    objects are present and absent, masks win and lose.
    """
    plan = make_plan(case.frames, **case.plan)
    valid = np.array(case.valid, bool)
    for attempt in range(ATTEMPTS):
        rng = np.random.default_rng([seed, attempt])
        torch.manual_seed(int(rng.integers(2**31)))
        batch = make_batch(rng, case.frames, valid, side)
        model = copy.deepcopy(base)
        with reference.images_remembered(model):
            run = tune(model, batch, plan)
        if run is None:
            continue
        exact_model = reference.exact_copy(model)
        with float64(), torch.no_grad():
            exact = train_forward(exact_model, batch, plan, run.drawn)
            firm = is_firm(run, exact, batch)
        if firm:
            yield Chosen(batch, plan, model, exact_model, run, exact)


def choose(base: reference.Reference, case: Case, seed: int, side: int) -> Chosen:
    """The first of those clips."""
    for chosen in clips(base, case, seed, side):
        return chosen
    raise AssertionError(f"no clip of {ATTEMPTS} leaves the reference's decisions beyond doubt")


def passes(run: Run, plan: PromptPlan):
    """(whether prompted, index, frame) of every decoder pass whose output is its own."""
    for i, frame in enumerate(run.frames):
        if frame["mask_inputs"] is None:
            for k in range(len(frame["multistep_pred_ious"])):
                yield bool(plan.is_cond[i]) or k > 0, k, frame


def scores_of(run: Run, plan: PromptPlan) -> dict[bool, torch.Tensor]:
    """All object scores of decoder passes without (False) and with prompts (True)."""
    scores: dict[bool, list] = {}
    for prompted, k, frame in passes(run, plan):
        scores.setdefault(prompted, []).append(frame["multistep_object_score_logits"][k])
    return {prompted: torch.cat(x).detach().flatten() for prompted, x in scores.items()}


def winners_of(run: Run, plan: PromptPlan) -> torch.Tensor:
    """Which of three masks had the highest predicted IoU, wherever there were three."""
    ious = [frame["multistep_pred_ious"][k] for _, k, frame in passes(run, plan)]
    none = torch.zeros(0, dtype=torch.int64)
    return torch.cat([none, *(x.argmax(1) for x in ious if x.shape[1] == 3)])


def varied(run: Run, plan: PromptPlan) -> bool:
    """Both signs of object scores, prompted or not, and several winners by predicted IoU."""
    shares = [float((x > 0).float().mean()) for x in scores_of(run, plan).values()]
    winners = winners_of(run, plan)
    return all(LEAST < x < 1 - LEAST for x in shares) and (
        not len(winners) or len(winners.unique()) > 1
    )


def decisions(run: Run, batch: Batch) -> dict[str, torch.Tensor]:
    """Numbers of which only the sign decides, by kind."""
    video, slot = np.nonzero(batch.valid)
    truths = torch.tensor(batch.masks[video, :, slot]).transpose(0, 1)
    found: dict[str, list] = {"score": [], "winner": [], "best": [], "iou": []}
    for frame, truth in zip(run.frames, truths, strict=True):
        if frame["mask_inputs"] is not None:
            continue
        for k, ious in enumerate(frame["multistep_pred_ious"]):
            score = frame["multistep_object_score_logits"][k].detach()
            found["score"].append(score)
            taught = (score[:, 0] > 0) & truth.any((1, 2))
            masks = frame["multistep_pred_multimasks_high_res"][k].detach()[taught]
            target = truth[taught, None].expand_as(masks)
            if ious.shape[1] == 3:
                found["winner"].append(gap(ious.detach()))
                dense = target.to(masks.dtype)
                focal = sigmoid_focal_loss(masks, dense, 1, loss_on_multimask=True)
                found["best"].append(gap(-20 * focal - dice_loss(masks, dense, 1, True)))
            union = ((masks > 0) | target).sum((2, 3)).clamp(min=1)
            found["iou"].append(ious.detach()[taught] - ((masks > 0) & target).sum((2, 3)) / union)
    return {kind: torch.cat([x.flatten() for x in xs]) for kind, xs in found.items() if xs}


def gap(x: torch.Tensor) -> torch.Tensor:
    """How far each is above the best of the others of its row."""
    others = [x[:, [j for j in range(x.shape[1]) if j != i]] for i in range(x.shape[1])]
    return x - torch.stack([other.max(1).values for other in others], 1)


def is_firm(run: Run, exact: Run, batch: Batch, times: float = tolerances.DECIDED) -> bool:
    """Whether float32 and float64 decide alike, by that many times what they differ."""
    rounded = decisions(run, batch)
    for kind, true in decisions(exact, batch).items():
        if rounded[kind].shape != true.shape:
            return False
        noise = (rounded[kind].double() - true).abs().max() if true.numel() else 0.0
        if bool((true.abs() < times * noise).any()):
            return False
    return True


def tune(model: reference.Reference, batch: Batch, plan: PromptPlan) -> Run | None:
    """Adjust the last layers of the decoder's heads until decisions fall both ways.

    Of random heads every object gets nearly the same score, every mask the same sign, and one
    mask of three is always the best: the others would be compared but never used. What objects
    are predicted absent changes all later frames, so this takes several rounds, and may fail.
    To be called without gradients.
    """
    decoder: Any = model.sam_mask_decoder
    score, iou = decoder.pred_obj_score_head.layers[-1], decoder.iou_prediction_head.layers[-1]
    hypers = [mlp.layers[-1] for mlp in decoder.output_hypernetworks_mlps]
    kinds = list(kinds_of_passes(plan))
    for round_ in range(ROUNDS):
        inputs: dict[Any, list[torch.Tensor]] = {}

        def watch(module, given, _, inputs=inputs):
            inputs.setdefault(module, []).append(given[0])

        hooks = [x.register_forward_hook(watch) for x in (score, iou, *hypers)]
        upscaled: list[torch.Tensor] = []
        last = decoder.output_upscaling[4]
        hooks.append(last.register_forward_hook(lambda *x, xs=upscaled: xs.append(x[2])))
        many: list[bool] = []  # masks of a pass
        hooks.append(
            decoder.register_forward_hook(lambda *x, xs=many: xs.append(x[2][0].shape[1] > 1))
        )
        run = train_forward(model, batch, plan)
        for hook in hooks:
            hook.remove()
        if round_ and varied(run, plan):
            return run
        tune_score(score, inputs[score], kinds, first=round_ < 2)
        if round_ < 2:
            tune_iou(iou, inputs[iou], kinds, many)
            pixel = torch.cat(upscaled).mean((0, 2, 3))
            for layer in hypers:  # logits of mean zero
                mean = layer(torch.cat(inputs[layer])).mean(0)
                layer.bias -= pixel * (mean @ pixel) / (pixel @ pixel)
    return None


def kinds_of_passes(plan: PromptPlan) -> str:
    """A letter per decoder pass in the order of calls: given mask, prompted or tracked."""
    kinds = ""
    for i in plan.order:
        kinds += ("p" if plan.use_points else "g") if plan.is_cond[i] else "t"
        kinds += "p" * (reference.CORRECTIONS * int(plan.is_corrected[i]))
    return kinds


def tune_score(layer, hidden: list[torch.Tensor], kinds: list[str], first: bool) -> None:
    """Scores of unit variance, alike with and without prompts, the widest gap around zero."""
    groups = [
        torch.cat([x for x, kind in zip(hidden, kinds, strict=True) if kind == wanted])
        for wanted in "pt"
        if wanted in kinds
    ]
    if first:
        if len(groups) == 2:
            between = groups[0].mean(0) - groups[1].mean(0)
            layer.weight -= (layer.weight @ between)[:, None] * between / (between @ between)
        layer.weight /= (torch.cat(groups) @ layer.weight[0]).std()
    ordered = (groups[-1] @ layer.weight[0]).sort().values
    third = len(ordered) // 3
    middle = ordered[third : len(ordered) - third]
    widest = int((middle[1:] - middle[:-1]).argmax())
    bias = -(middle[widest] + middle[widest + 1]) / 2
    # Later by half, for an object that is absent on one frame is sooner absent on the next
    layer.bias += (bias - layer.bias) * (1.0 if first else 0.5)


def tune_iou(layer, hidden: list[torch.Tensor], kinds: list[str], many: list[bool]) -> None:
    """Predictions before the sigmoid of unit variance; of mean zero where masks compete.

    With one mean for all three, none of them can be above another everywhere.
    """
    own = torch.cat([x for x, kind in zip(hidden, kinds, strict=True) if kind != "g"])
    layer.weight /= (own @ layer.weight.T).std(0)[:, None]
    compete = [x for x, several in zip(hidden, many, strict=True) if several] or [own]
    layer.bias.copy_(-(torch.cat(compete) @ layer.weight.T).mean(0))
