"""Train AlignVLM's three stages: captions, documents, instructions (paper section 3.3).

    python train.py                         # the toy: all stages, ten minutes on two cores
    python train.py --stage 1               # one of them; the next starts from its folder
    torchrun --nproc_per_node 8 train.py --stage 1 --data cc12m/ --out out/1b \\
        --vision google/siglip-so400m-patch14-384 --llm meta-llama/Llama-3.2-1B-Instruct   # 8 GPUs

Stage 0 stands for what a released LLM brings along: the toy's own LLM learns to read pages as plain
text, before it meets an image (the shipped one, toy/stage0, has done so already). Every stage
writes a folder OUT/stageN, from which the next one and sample.py start. The same command goes on
where it was interrupted, and does not train again what is complete. To train a stage anew, delete
its folder; what it has begun lies in OUT/stageN.partial. `python -m paper.plan` says what training
takes.
"""
import argparse
import functools
import itertools
import json
import math
import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy,
                                    fully_shard)
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, Subset

from connector import CONNECTORS, ConnectorConfig
from data import Sample, Tokenizer, encode_chat, fill_rows, pack_row, prepare
from eval import held_out_scores, report
from model import ALIGNVLM_PRESETS, IGNORE, IMAGE, AlignVLM, AlignVLMConfig, read_config, read_llama
from paper.plan import step_flops
from paper.recipes import RECIPES, Recipe, lr_share, preset_for, recipe_for
from plumbing import fast
from plumbing.examples import Turn
from plumbing.logs import Step, StepLog
from plumbing.processes import (gather_model, name_stalled_rank, on_first_rank, run_main,
                                start_processes)
from plumbing.runs import (begin, check_recipe, check_shared, claim, is_complete, recorded,
                           refuse_foreign, weights_mark)
from plumbing.settings import SEVERAL, InputError, a_path, positive, tile_limit
from plumbing.signals import stop_on_signal
from plumbing.states import States, drop_states, newest_state
from plumbing.streams import (BAD_KINDS, Documents, Position, agree_on_files, agree_on_position,
                              check_bad_share, check_same_files, check_usable, deal,
                              first_references, full_spec, keep_good, steps_of)
from plumbing.weights import model_folder
from plumbing.workers import loaded, start_worker
from reader.enlarge import enlarge
from reader.join import make_stage0
from reader.lessons import ReaderDocuments
from toy.pages import STAGE0, ToyDocuments, write_toy_tokenizer
from vision import SigLIPConfig

EVAL_SAMPLES = 64               # held-out samples of --eval-every
JUDGED_SAMPLES = 1000           # after so many, or an epoch, --max-bad is looked at
STOP = threading.Event()        # SIGTERM or SIGINT has come: finish the step, save, leave


# --------------------------------------------------------------------------------------------------
# The model, cut among ranks


def build(stage: int, start: Path | None, recipe: Recipe, connector: ConnectorConfig,
          args: argparse.Namespace, device: torch.device) -> AlignVLM:
    """The model as a stage starts, in fp32 and sharded: from released weights, from the folder
    `start`, or for the toy's stage 0 from scratch. Seeds torch."""
    def set_up(model: AlignVLM) -> None:        # before it has weights: a rank reads only its part
        fast.use(model)
        for name, module in model.named_children():
            # Stage 3 freezes the vision encoder: paper/recipes.py, LATE.
            module.requires_grad_(name in recipe.trainable)
        shard(model, device, args.shard_size, args.recompute, args.compile, recipe.bf16,
              args.offload, args.timeout)

    home = torch.device("cpu") if args.offload else device      # of the weights
    torch.manual_seed(args.seed)
    if stage == 0:
        model = AlignVLM(ALIGNVLM_PRESETS["toy"])
        model.init_weights()
        set_up(model.to(home))
        return model
    if stage == 1 and args.llm:
        return AlignVLM.from_backbones(args.vision, args.llm, torch.float32, home, set_up,
                                       connector)
    # Later stages keep the folder's connector. So does the reader's stage 1: reader/join.py has
    # trained its Align already.
    is_trained = args.preset == "reader" and connector.kind == "align"
    new_connector = connector if stage == 1 and not is_trained else None
    return AlignVLM.from_pretrained(start, torch.float32, home, set_up, new_connector)


def shard(model: AlignVLM, device: torch.device, shard_size: int | None = None,
          recompute: bool = False, compile: bool = False, bf16: bool = False,
          offload: bool = False, timeout: timedelta = timedelta(minutes=10)) -> None:
    """FSDP2, in place: each block, the connector and the vision tower are gathered when they run.
    What is left, the token embedding foremost, stays gathered: connector, decoder and head share
    it. On CUDA the computation is bf16, elsewhere if `bf16` says so. offload: weights, gradients
    and the optimizer stay in the CPU's memory, where the model's weights must be by now.

    shard_size: ranks that hold one copy of the model between them; by default all (the paper's
    ZeRO-3), and so is any number above. Groups of fewer, say of one node, are each other's
    replicas, and only gradients travel between them (hybrid). Raises InputError where it does not
    divide the ranks. recompute, compile: see --help. timeout: of ranks that wait for each other.
    """
    policy = MixedPrecisionPolicy()
    if bf16 or device.type == "cuda":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    blocks = [*model.vision.encoder["layers"], *model.llm.layers]
    if compile:
        # The compiler makes a graph for each case that a block meets: with images or without,
        # frozen or not, the first block or another. By default it gives up after eight.
        torch._dynamo.config.recompile_limit = 64
    for block in blocks:
        if compile:         # first: the compiler does not enter what checkpoint wraps
            block.forward = torch.compile(block.forward)
        if recompute:       # keep a block's input alone, and run it again in the backward pass
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False,
                                              preserve_rng_state=False)
    mesh = mesh_of(device, shard_size, timeout)
    offloading = OffloadPolicy()
    if offload:
        offloading = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    for module in [*blocks, model.vision, model.connector, model]:
        fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=offloading)


def mesh_of(device: torch.device, shard_size: int | None, timeout: timedelta) -> DeviceMesh:
    """The ranks in one dimension, "shard", or, for copies of shard_size ranks, in two: "replicate"
    and "shard". timeout: of their waiting for each other. Raises InputError as `shard` does."""
    world = dist.get_world_size()
    size = min(shard_size or world, world)
    if world % size:
        raise InputError(f"--shard-size {size} does not divide the {world} processes")
    if size == world:
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    ranks = torch.arange(world).view(-1, size)
    # Groups that the mesh made by itself would wait for half an hour.
    groups = [dist.new_subgroups_by_enumeration(each.tolist(), timeout)[0]
              for each in (ranks.T, ranks)]
    return DeviceMesh.from_group(groups, device.type, ranks, mesh_dim_names=("replicate", "shard"))


def optimizer_of(model: AlignVLM, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW over the stage's modules; weight decay on matrices alone. A group's scale multiplies
    the learning rate."""
    groups = []
    for name in recipe.trainable:
        parameters = list(getattr(model, name).parameters())
        scale = recipe.lr_scale.get(name, 1.0)
        groups.append({"params": [p for p in parameters if p.ndim > 1],
                       "weight_decay": recipe.weight_decay, "scale": scale})
        groups.append({"params": [p for p in parameters if p.ndim <= 1],
                       "weight_decay": 0.0, "scale": scale})
    return torch.optim.AdamW(groups, betas=recipe.betas, eps=recipe.eps, fused=True)


# --------------------------------------------------------------------------------------------------
# One step, in the order in which things happen: the rows of all ranks are matched, each row goes
# forward and backward, its gradients are added to those before and summed over ranks; at the end of
# the step they are clipped, and the optimizer moves the weights.


def match_ranks(rows: list[list[Sample]],
                config: AlignVLMConfig) -> tuple[list[list[Sample]], Counter]:
    """The rows of this rank, so that all ranks call the same modules equally often: under FSDP they
    wait otherwise. A rank with fewer rows than another gets blank ones, and a row without an image
    a blank tile if any rank has one.

    Also returns what all ranks have together: tokens (visual ones too), supervised ones, tiles,
    images, the sum of the samples' squared lengths, and, apart from these, tokens of blank samples.
    """
    has_image = any(len(sample.pixels) for row in rows for sample in row)
    most = torch.tensor([len(rows), has_image], dtype=torch.int64)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    n_rows, n_blank_tiles = most.tolist()       # a blank sample has one tile, or none
    blank = blank_sample(config, n_blank_tiles)
    matched = []
    for row in rows + [[]] * (n_rows - len(rows)):
        lacks_tile = n_blank_tiles > 0 and not any(len(sample.pixels) for sample in row)
        matched.append([*row, blank] if not row or lacks_tile else row)
    counts = count(matched, blank)
    totals = torch.tensor([*counts.values()])
    dist.all_reduce(totals)
    return matched, Counter(dict(zip(counts, totals.tolist())))


def blank_sample(config: AlignVLMConfig, n_tiles: int) -> Sample:
    """A sample that teaches nothing: one tile, or where there shall be none, one token of text."""
    n = config.tile_tokens if n_tiles else 1
    side = config.vision.image_size
    pixels = torch.zeros(n_tiles, 3, side, side, dtype=torch.uint8)
    tokens = torch.full((n,), IMAGE if n_tiles else 0)
    labels = torch.full((n,), IGNORE)
    return Sample(tokens, labels, pixels, [(0, 0, 0, 0)] * n_tiles, "blank")


def count(rows: list[list[Sample]], blank: Sample) -> Counter:
    """What this rank's rows hold: see match_ranks. Of a blank sample only its tokens count, as
    blank ones."""
    counts = Counter(tokens=0, supervised=0, blank=0, tiles=0, images=0, squares=0)
    for sample in itertools.chain(*rows):
        length = len(sample.tokens)
        if sample is blank:
            counts["blank"] += length
            continue
        counts["tokens"] += length
        counts["squares"] += length ** 2
        counts["tiles"] += len(sample.pixels)
        counts["supervised"] += int((sample.labels != IGNORE).sum())
        counts["images"] += sample.n_images
    return counts


def row_loss(model: AlignVLM, row: list[Sample], device: torch.device) -> Tensor:
    """Forward: a row's samples -> the sum of its cross-entropies, in nats."""
    # (1, L) both, (T, 3, S, S) on the device
    tokens, labels, pixels, lengths = pack_row(row, model.config.vision, device)
    # FSDP moves tensors to the GPU, and to find places in them there would wait for all work before
    # it. Arrays stay.
    return model(tokens.numpy(), labels.numpy(), pixels, lengths)


def accumulate_gradients(model: AlignVLM, rows: list[list[Sample]],
                         device: torch.device) -> tuple[Tensor | None, Counter, list[Tensor]]:
    """Add a step's gradient to the parameters' grad. The step's loss is the mean over the
    supervised tokens of all ranks: how they are split into rows changes nothing.

    Returns that loss (nats per token; None, and no gradient, if there is nothing to learn from),
    match_ranks' counts, and the sums of this rank's rows. All losses stay on the device.
    """
    rows, counts = match_ranks(rows, model.config)
    # Text alone passes only the LLM: if that is frozen, backward() would find no gradient.
    text_alone = counts["tiles"] == 0
    llm_is_frozen = not model.llm.norm.weight.requires_grad
    if counts["supervised"] == 0 or (text_alone and llm_is_frozen):
        return None, counts, []
    row_sums = []
    for i, row in enumerate(rows):
        # FSDP sums gradients over ranks inside of backward(): at every row over those that share a
        # copy of the model, between replicas (--shard-size) only at the last.
        model.set_requires_all_reduce(i == len(rows) - 1)
        row_sum = row_loss(model, row, device)
        # FSDP's sum is a mean over the ranks: hence times their number.
        (row_sum * dist.get_world_size() / counts["supervised"]).backward()
        row_sums.append(row_sum.detach())
    total = sum(row_sums)
    dist.all_reduce(total)
    return total / counts["supervised"], counts, row_sums


def take_step(model: AlignVLM, optimizer: torch.optim.Optimizer, rows: list[list[Sample]],
              lr: float, clip: float, device: torch.device
              ) -> tuple[Tensor | None, torch.cuda.Event | None, Counter]:
    """One step of the optimizer, which changes the model, unless the loss or the gradient is not
    finite: then all ranks skip it. The device decides that, and the host does not wait for it.

    Returns numbers, sent and counts. numbers (2 + rows,), on the CPU: the loss, the gradient's norm
    and the sums of this rank's rows; None if there was nothing to learn from. sent: on a GPU the
    event after which numbers may be read; else None. counts: match_ranks'.
    """
    loss, counts, row_sums = accumulate_gradients(model, rows, device)
    if loss is None:
        return None, None, counts
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip).full_tensor().to(device)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]
    bad = ~(loss.isfinite() & norm.isfinite())
    # As GradScaler does: a fused step then changes nothing.
    optimizer.found_inf = bad.float().to(parameters[0].device)
    optimizer.step()
    optimizer.zero_grad()
    numbers = torch.stack([loss, norm, *row_sums])                              # (2 + rows,)
    numbers = numbers.to("cpu", non_blocking=True)
    sent = torch.cuda.current_stream().record_event() if loss.is_cuda else None
    return numbers, sent, counts


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warmup, then a cosine to final_lr * lr."""
    warmup = max(1, round(recipe.warmup * recipe.steps))
    if step < warmup:
        return recipe.lr * (step + 1) / warmup
    share = min(1, (step - warmup) / max(1, recipe.steps - warmup))
    cosine = 0.5 * (1 + math.cos(math.pi * share))
    return recipe.lr * (recipe.final_lr + (1 - recipe.final_lr) * cosine)


# --------------------------------------------------------------------------------------------------
# The steps of a stage


@dataclass
class Progress:
    """How far a stage has come: what goes with a training state."""
    step: int = 0                                           # the next one
    position: Position = field(default_factory=Position)    # in the data
    bad: Counter = field(default_factory=Counter)           # samples by kind, and all "seen"
    learnt: int = 0                                         # steps with a token to learn from
    skipped: int = 0            # those of these steps whose loss or gradient was not finite
    files: dict = field(default_factory=dict)               # of --data, by path

    def record(self) -> dict:
        """As JSON."""
        return {**vars(self), "position": vars(self.position)}

    @classmethod
    def of(cls, record: dict, path: Path) -> "Progress":
        """From the record of the training state at `path`. Raises InputError where it is
        damaged."""
        try:
            position, bad = Position(**record["position"]), Counter(record["bad"])
            return cls(**{**record, "position": position, "bad": bad})
        except (KeyError, TypeError) as error:
            file = path / "progress.json"
            raise InputError(f"{file}: damaged ({error}): delete {path}") from None


def is_over(progress: Progress, recipe: Recipe, n_steps: int | None) -> bool:
    """Whether a stage is: after --steps, or else after the recipe's epochs."""
    if n_steps is not None:
        return progress.step >= n_steps
    return progress.position.epoch >= recipe.epochs


def train_stage(stage: int, recipe: Recipe, model: AlignVLM, tokenizer: Tokenizer,
                state: Path | None, args: argparse.Namespace, device: torch.device) -> bool:
    """Train a sharded model for one stage on --data, or else on its preset's pages, from a training
    state on, if there is one. Changes the model, and writes log.jsonl and states into the stage's
    folder.

    Returns whether the stage is complete; if not, it was asked to stop, and its state is saved.
    """
    folder = args.out / f"stage{stage}.partial"
    documents, held_out = open_documents(stage, recipe, tokenizer, model.config, args)
    recipe = with_steps(recipe, documents, args)
    optimizer = optimizer_of(model, recipe)
    states = States(folder, model, optimizer, args.timeout)
    progress = begin_or_resume(documents, states, state)
    steps = steps_of(loader_of(documents, progress.position, recipe.batch_size, args.workers))
    flops = functools.partial(step_flops, model.config, recipe.trainable)
    with StepLog(folder / "log.jsonl", stage, progress.step, recipe.steps, progress.skipped, device,
                 flops) as log:
        while not is_over(progress, recipe, args.steps):
            # This rank's share of the step's samples, and the place in the data after the step.
            samples, position = next(steps)
            enough = args.max_steps is not None and progress.step >= args.max_steps
            # Raises unless all ranks are at the same place. If one has to stop, all do.
            must_stop = agree_on_position(position, STOP.is_set() or enough)
            if must_stop:
                progress.skipped = log.settle()
                states.save(progress.step, progress.record())
                break

            # Samples -> rows; adds the bad samples to progress.bad.
            samples = keep_good(samples, documents, progress.bad)
            if progress.bad["seen"] >= JUDGED_SAMPLES or position.epoch > progress.position.epoch:
                check_bad_share(progress.bad, args.max_bad)
            rows = fill_rows(samples, recipe.row_tokens)

            # Rows -> gradients -> weights.
            lr = learning_rate(progress.step, recipe)
            numbers, sent, counts = take_step(model, optimizer, rows, lr, recipe.clip, device)
            progress.learnt += numbers is not None

            log.add(logged_step(progress, lr, rows, counts, numbers, sent))
            progress.step += 1
            progress.position = position
            # Ten bad steps in a row end the training: by then the last good state must be complete.
            states.finish(wait=log.bad_in_a_row > 0)
            over = is_over(progress, recipe, args.steps)
            if over or progress.step % args.save_every == 0:
                progress.skipped = log.settle()
                if over or not log.bad_in_a_row:
                    states.save(progress.step, progress.record())

            if args.eval_every and progress.step % args.eval_every == 0:
                log.settle()
                scores = evaluate_held_out(stage, model, tokenizer, held_out, recipe, args, device)
                log.write(step=progress.step - 1, **scores)
        states.finish()
    complete = is_over(progress, recipe, args.steps)
    if complete:
        check_learnt(stage, progress, args)
    return complete


def begin_or_resume(documents: Dataset, states: States, state: Path | None) -> Progress:
    """The start of a stage, or how far it had come in the training state at `state`, whose weights
    and moments the model and optimizer of `states` take over. Raises InputError, also where files
    of --data are no longer what they were."""
    files = {}
    if isinstance(documents, Documents):
        agree_on_files(documents)
        files = on_first_rank(documents.file_marks)
    if state is None:
        return Progress(files=files)
    progress = Progress.of(states.load(state), state)
    check_same_files(progress.files, files)
    return progress


def check_learnt(stage: int, progress: Progress, args: argparse.Namespace) -> None:
    """Raise InputError if too many of a stage's samples were bad, or no step moved the weights."""
    check_bad_share(progress.bad, args.max_bad)
    if progress.learnt <= progress.skipped:
        folder = args.out / f"stage{stage}.partial"
        raise InputError(
            f"stage {stage} has learnt nothing: of its {progress.step} steps "
            f"{progress.step - progress.learnt} had no token to learn from, and {progress.skipped} "
            f"a loss or gradient that is not finite: delete {folder}, and look at --data")


def open_documents(stage: int, recipe: Recipe, tokenizer: Tokenizer, config: AlignVLMConfig,
                   args: argparse.Namespace) -> tuple[Dataset, Subset | None]:
    """What a stage learns from, and what it is evaluated on: --data and --eval-data, or else the
    pages that the preset reader draws, or the toy for any other. Raises InputError."""
    if not args.data or stage == 0:
        kind = ReaderDocuments if args.preset == "reader" else ToyDocuments

        def drawn(n: int, split: str) -> Dataset:
            return kind(stage, n, args.seed, tokenizer, config.vision, split, config.tile_tokens)

        held_out = drawn(EVAL_SAMPLES, "held-out")
        return (drawn(recipe.steps * recipe.batch_size, "train"),
                Subset(held_out, first_references(held_out, EVAL_SAMPLES)))

    encode_chat([Turn("user", [])], tokenizer, [])      # refuses here, not sample by sample
    make_sample = functools.partial(
        prepare, tokenizer=tokenizer, config=config.vision, max_text=recipe.max_length,
        max_tokens=recipe.row_tokens, tile_tokens=config.tile_tokens)
    held_out = None
    if args.eval_data:
        every = Documents(args.eval_data, args.seed, make_sample, held_out=True)
        check_usable(every, EVAL_SAMPLES)
        held_out = Subset(every, first_references(every, EVAL_SAMPLES))
    return Documents(args.data, args.seed, make_sample), held_out


def with_steps(recipe: Recipe, documents: Dataset, args: argparse.Namespace) -> Recipe:
    """The recipe with the steps that its epochs of --data take, about, unless they are given: for
    the schedule and the bar. The stage ends where its last epoch does."""
    if not isinstance(documents, Documents) or args.steps is not None:
        return recipe
    samples = recipe.epochs * on_first_rank(documents.epoch_samples)    # one schedule on all ranks
    return replace(recipe, steps=math.ceil(samples / recipe.batch_size))


def loader_of(documents: Dataset, position: Position, batch_size: int, workers: int) -> Iterator:
    """This rank's share of the samples from a position on; after each step's the Position that
    follows. Raises InputError where a loading process, or a sample, is lost."""
    rank, world = dist.get_rank(), dist.get_world_size()
    order = deal(documents.draws(position), batch_size, rank, world)
    ahead = None
    if workers:
        ahead = max(2, batch_size // (world * workers))     # samples of each: of all about a step
    loader = DataLoader(documents, batch_size=None, sampler=order, num_workers=workers,
                        prefetch_factor=ahead, worker_init_fn=start_worker)
    return loaded(loader)


def logged_step(progress: Progress, lr: float, rows: list[list[Sample]], counts: Counter,
                numbers: Tensor | None, sent: torch.cuda.Event | None) -> Step:
    """What the log is told of a step that was taken; numbers, sent, counts: take_step's."""
    bad = {kind: progress.bad[kind] for kind in BAD_KINDS if progress.bad[kind]}
    line = dict(step=progress.step, epoch=progress.position.epoch, lr=lr, bad=bad)
    keys = [[sample.key for sample in row] for row in rows]
    return Step(line, counts, keys, numbers, sent)


@torch.no_grad()
def evaluate_held_out(stage: int, model: AlignVLM, tokenizer: Tokenizer, held_out: Subset,
                      recipe: Recipe, args: argparse.Namespace, device: torch.device
                      ) -> dict[str, float]:
    """The held-out loss (nats per supervised token, all ranks'); from stage 2 on also how the toy
    reads and answers."""
    share = range(dist.get_rank(), len(held_out), dist.get_world_size())
    samples = [held_out[i] for i in share]
    samples = [sample for sample in samples if isinstance(sample, Sample)]      # not a bad one
    rows, counts = match_ranks(fill_rows(samples, recipe.row_tokens), model.config)
    total = torch.zeros((), device=device)
    for row in rows:
        total += row_loss(model, row, device)
    dist.all_reduce(total)
    if counts["supervised"] == 0:
        raise InputError("the held-out samples have no token to be judged by: look at --eval-data")
    scores = {"held_out_loss": total.item() / counts["supervised"]}
    if args.preset == "toy" and stage > 1 and args.held_out:
        whole = gather_model(model)
        fast.use(whole)
        n = min(50, args.held_out)
        scores |= held_out_scores(whole, tokenizer, n, args.seed)["held-out"]
    return scores


# --------------------------------------------------------------------------------------------------
# One stage: from the folder of the one before to its own


def run_stage(stage: int, args: argparse.Namespace, device: torch.device) -> bool:
    """Build, train and export one stage, unless that is done. Returns whether it is complete."""
    recipe = recipe_of(stage, args)
    start = start_of(stage, args)
    if args.preset == "reader" and stage == 2:
        make_larger(args.out / "stage1", start)
    folder, partial = args.out / f"stage{stage}", args.out / f"stage{stage}.partial"
    main_rank = dist.get_rank() == 0
    complete = on_first_rank(lambda: is_complete(stage, args.out))
    if stage > 1 and not complete and not (start / "config.json").exists():
        raise InputError(f"stage {stage} starts from stage {stage - 1}, and {args.out} has none: "
                         "train that first")
    connector = connector_of(stage, folder if complete else start, args)
    max_tiles = args.max_tiles or tiles_of(stage, start, args)
    record = record_of(stage, recipe, connector, max_tiles, args)
    record["start"] = None
    if stage == 1 and args.llm:
        record["start"] = on_first_rank(lambda: weights_mark(args.vision, args.llm))
    elif stage > 0 and not complete:
        record["start"] = recorded(start, "id")
    if complete:
        check_recipe(folder, record)
        if main_rank:
            drop_states(folder)
            print(f"stage {stage} is complete in {folder} (delete it to train it again)")
        return True

    on_first_rank(lambda: refuse_foreign(folder, partial))  # now, not after days of training
    model = build(stage, start, recipe, connector, args, device)
    # config.json gets the tiles of a page that this stage learns with: sample.py takes as many.
    model.config = replace(model.config, vision=replace(model.config.vision, max_tiles=max_tiles))
    # A tokenizer goes with its LLM: the released one's, or that of the folder from which the stage
    # starts. It is read before anything is written; stage 0 writes its own.
    vocab_size = model.config.llm.vocab_size
    tokenizer = Tokenizer(start, vocab_size) if stage > 0 else None
    state, training = on_first_rank(lambda: begin(partial, record, model))
    check_shared(partial, training, args.timeout)
    if stage == 0:
        on_first_rank(lambda: write_toy_tokenizer(partial / "tokenizer.model"))
    tokenizer = tokenizer or Tokenizer(partial, vocab_size)
    if not train_stage(stage, recipe, model, tokenizer, state, args, device):
        if main_rank:
            print(f"stage {stage} has stopped, its state is in {newest_state(partial)}: the same "
                  "command goes on")
        return False
    # A stage is handed on in bf16, but for the small models: there fp32 costs next to nothing.
    small = args.preset == "toy" or args.preset == "reader" and stage < 3
    dtype = torch.float32 if small else torch.bfloat16
    model.save_pretrained(folder, tokenizer.path, dtype)
    if main_rank:
        drop_states(folder)
    return True


def make_larger(folder: Path, out: Path) -> None:
    """Write the reader's stage 1 with larger tiles to `out`, where stage 2 starts.

    Nothing is written if `out` was made from this same stage 1. recipe.json is copied last: its id
    tells which stage 1 that was.
    """
    def is_due() -> bool:
        made = (out / "config.json").exists() and recorded(out, "id") == recorded(folder, "id")
        return (folder / "config.json").exists() and not made

    if on_first_rank(is_due):
        enlarge(folder, out)        # all ranks: they wait for each other in it
        if (folder / "recipe.json").exists():
            on_first_rank(lambda: shutil.copyfile(folder / "recipe.json", out / "recipe.json"))


def start_of(stage: int, args: argparse.Namespace) -> Path | None:
    """The folder from which a stage starts, or would: that of the stage before. For stage 1 that is
    --llm, or else this run's stage0, or the toy's that is shipped; for the reader's stage 2 its
    stage 1 with larger tiles. None for stage 0."""
    if stage == 0:
        return None
    if stage == 1 and args.llm:
        return args.llm
    before = args.out / f"stage{stage - 1}"
    if stage == 2 and args.preset == "reader":
        return args.out / "stage1-large"
    if stage == 1 and args.preset != "reader" and not (before / "config.json").exists():
        return STAGE0
    return before


def connector_of(stage: int, folder: Path | None, args: argparse.Namespace) -> ConnectorConfig:
    """What --connector asks for in stage 1, then what the folder has. Raises InputError if it asks
    for another."""
    if stage == 0:
        return ALIGNVLM_PRESETS["toy"].connector
    if stage == 1:
        sizes = ALIGNVLM_PRESETS["llama-3.2-1b" if args.llm else "toy"].connector
        return replace(sizes, kind=args.connector or sizes.kind)
    connector = read_config(folder).connector
    if args.connector not in (None, connector.kind):
        raise InputError(f"{folder} has the connector {connector.kind}: another begins with stage "
                         "1")
    return connector


def tiles_of(stage: int, start: Path | None, args: argparse.Namespace) -> int:
    """The tiles of a page, at most, in the folder from which a stage starts; of released weights,
    and of a folder that is gone, 9."""
    ours = start is not None and not (stage == 1 and args.llm) and (start / "config.json").exists()
    return read_config(start).vision.max_tiles if ours else SigLIPConfig.max_tiles


def record_of(stage: int, recipe: Recipe, connector: ConnectorConfig, max_tiles: int,
              args: argparse.Namespace) -> dict:
    """What recipe.json says that a stage was trained with; as it is read again, from JSON."""
    record = {"preset": args.preset, "seed": args.seed, "data": None, "max_tiles": max_tiles,
              "connector": connector.kind, **asdict(recipe)}
    if stage > 0:
        record["data"] = args.data and [full_spec(spec) for spec in args.data]
    return json.loads(json.dumps(record))


# --------------------------------------------------------------------------------------------------
# The command


def main() -> None:
    args = parse_args()
    if args.llm is not None:
        args.vision, args.llm = model_folder(args.vision), model_folder(args.llm)
    args.preset = args.preset or choose_preset(args)
    args.out = args.out or Path("out") / args.preset
    stages = stages_of(args)
    device = start_processes(args.timeout)
    on_first_rank(lambda: claim(args.out, args.timeout))
    if args.preset == "reader" and 1 in stages and not (args.out / "stage0").exists():
        if dist.get_world_size() > 1:
            raise InputError(f"{args.out} has no stage0: python -m reader.join {args.out} makes "
                             "it, in one process")
        make_stage0(args.out, args.seed)
    with name_stalled_rank(args.timeout):
        with stop_on_signal(STOP):
            complete = all(run_stage(stage, args, device) for stage in stages)
        last = args.out / f"stage{stages[-1]}"
        if complete and stages[-1] > 0 and dist.get_rank() == 0:
            print(f"ask it: python sample.py --checkpoint {last} --image PAGE.png", flush=True)
            is_toy = args.preset == "toy" and stages[-1] == 3
            if is_toy and args.held_out and not STOP.is_set():
                report(last, args.held_out, args.seed, device)
        dist.barrier()
    dist.destroy_process_group()


def choose_preset(args: argparse.Namespace) -> str:
    """The preset where --preset is not given. With --llm by its size. With --out and --stage that
    of the folder from which the stage starts, or, if it names none, by its LLM's size. Else the
    toy."""
    if args.llm:
        return preset_for(read_llama(args.llm)[0])
    if args.out and args.stage:
        start = args.out / f"stage{args.stage - 1}"
        trained_with = recorded(start, "preset")
        if trained_with in list(RECIPES):
            return trained_with
        if (start / "config.json").exists():
            return preset_for(read_config(start).llm)
    return "toy"


def stages_of(args: argparse.Namespace) -> list[int]:
    """The stages to train, in order: --stage or all; before stage 1 the toy's stage 0, if there is
    no LLM to start from. Raises InputError for what the preset cannot do."""
    stages = [stage for stage in RECIPES[args.preset] if stage > 0]
    if args.stage is not None:
        stages = [args.stage]
    for stage in stages:
        recipe_of(stage, args)          # raises
    if args.preset not in ("toy", "reader") and args.steps is None and not args.data:
        raise InputError(f"the recipe {args.preset} counts epochs, drawn pages have none: give "
                         "--data or --steps")
    if 1 in stages and not args.llm and not is_complete(1, args.out):
        if args.preset not in ("toy", "reader"):
            raise InputError(f"the recipe {args.preset} is for released weights: give stage 1 "
                             "--vision and --llm")
        if args.preset == "toy" and not (start_of(1, args) / "config.json").exists():
            stages = [0, *stages]       # the toy's LLM is pretrained, as a released one is
    return stages


def recipe_of(stage: int, args: argparse.Namespace) -> Recipe:
    """The preset's recipe for a stage, with what the flags say instead. Raises InputError."""
    names = ("steps", "batch_size", "row_tokens", "max_length", "epochs", "lr")
    changes = {name: getattr(args, name) for name in names}
    return recipe_for(args.preset, stage, changes, args.lr_scale)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_recipe_flags(parser.add_argument_group("what is trained").add_argument)
    add_data_flags(parser.add_argument_group("data").add_argument)
    add_run_flags(parser.add_argument_group("the run").add_argument)
    args = parser.parse_args()
    for is_wrong, why in impossible(args):
        if is_wrong:
            parser.error(why)
    if args.workers is None:
        args.workers = min(4, os.cpu_count()) if args.data else 0
    args.lr_scale = dict(args.lr_scale)
    args.timeout = timedelta(seconds=min(args.timeout, 1e8))
    return args


def add_recipe_flags(add) -> None:
    add("--preset", choices=list(RECIPES), help="recipe (default: by the size of --llm, or that "
        "of the stage before in --out; for an unknown size that of llama-3.2-1b; without either "
        "the toy's)")
    add("--vision",
        help="folder with a released SigLIP, or its name on the hub, `owner/name@revision`, for "
        "stage 1 (default: that of the preset, toy or reader)")
    add("--llm", help="the same of a released Llama with its tokenizer (default: that of the "
        "preset, toy or reader)")
    add("--connector", choices=CONNECTORS,
        help="between the two, new in stage 1, kept from then on (default: align)")
    add("--stage", type=int, choices=[0, 1, 2, 3],
        help="train this stage only (default: all, in order)")
    add("--seed", type=int, default=0, help="of weights and data (default: %(default)s)")
    add("--steps", type=positive(int),
        help="optimizer steps of each stage (default: the recipe's)")
    add("--batch-size", type=positive(int),
        help="samples a step, over all processes (default: the recipe's)")
    add("--row-tokens", type=positive(int), help="tokens a forward pass, visual ones too; a "
        "process's share of a step takes as many passes as it needs; a longer text is cut "
        "(default: the recipe's)")
    add("--max-length", type=positive(int),
        help="text tokens a sample, cut at its end (default: the recipe's)")
    add("--epochs", type=positive(int), help="passes over --data (default: the recipe's)")
    add("--lr", type=positive(float), help="peak learning rate (default: the recipe's)")
    add("--lr-scale", type=lr_share, **SEVERAL, default=[], metavar="MODULE=SHARE",
        help="what vision, connector or llm has of --lr: vision=0.2; 0 freezes it, any other share "
        "trains it (default: the recipe's)")


def add_data_flags(add) -> None:
    add("--data", **SEVERAL, metavar="PATH[:WEIGHT]", help="what --stage learns from: folders, "
        "files or globs of tar (img2dataset), parquet (BigDocs, VCR-wiki), JSONL or JSON "
        "(DocDownstream, MS-Swift, LLaVA); with weights the data sets are mixed in that ratio "
        "(default: the drawn pages of the preset, toy or reader)")
    add("--max-tiles", type=tile_limit, help="tiles a page is cut into at most (default: as in "
        "the folder from which the stage starts; of released weights 9)")
    add("--max-bad", type=float, default=0.01, help="share of bad samples above which training "
        "stops, judged from a thousand samples or an epoch on (default: %(default)s)")
    add("--workers", type=int,
        help="data loading processes per process (default: with --data up to 4, else 0)")
    add("--eval-data", **SEVERAL, metavar="PATH",
        help="held-out data of --eval-every, as for --data (toy and reader draw their own)")


def add_run_flags(add) -> None:
    add("--out", type=a_path, help="the run's folder (default: out/PRESET)")
    add("--save-every", type=positive(int), default=200,
        help="steps between training states (default: %(default)s)")
    add("--max-steps", type=positive(int),
        help="save and leave after so many steps of the stage; a larger number, or none, goes on")
    add("--eval-every", type=positive(int),
        help="steps between evaluations of the held-out loss (default: none)")
    add("--held-out", type=int, default=200,
        help="documents the toy reads at the end, and up to 50 of them at each --eval-every "
        "(default: %(default)s; 0: none)")
    add("--shard-size", type=positive(int),
        help="processes that hold one copy of the model between them (default: all of them)")
    add("--recompute", action="store_true",
        help="compute activations twice instead of keeping them")
    add("--compile", action="store_true", help="torch.compile each block")
    add("--offload", action="store_true", help="keep weights, gradients and optimizer in the CPU's "
        "memory: for a GPU that is too small for them")
    add("--timeout", type=positive(float), default=600,
        help="seconds to wait for a stalled process (default: %(default)s)")


def impossible(args: argparse.Namespace) -> list[tuple[bool, str]]:
    """Combinations of flags: whether they are given, and why they cannot be."""
    of_data = args.epochs or args.max_length or args.max_tiles or args.eval_data
    return [
        (args.held_out < 0 or args.workers is not None and args.workers < 0,
         "--workers and --held-out are at least 0"),
        (not 0 <= args.seed < 2 ** 63, "--seed is from 0 to 2**63 - 1"),
        (not 0 <= args.max_bad <= 1, "--max-bad is from 0 to 1"),
        (not args.data and of_data, "--epochs, --max-length, --max-tiles and --eval-data are of "
         "--data: drawn pages have --steps"),
        (args.data and not args.stage, "--data is for one stage: add --stage 1, 2 or 3"),
        (args.data and bool(args.eval_every) != bool(args.eval_data),
         "beside --data, --eval-every and --eval-data go together: how often, and on what"),
        (args.epochs and args.steps,
         "--epochs or --steps, not both: a stage ends after one of them"),
        (bool(args.vision) != bool(args.llm),
         "--vision and --llm go together: two folders with released weights"),
    ]


if __name__ == "__main__":
    run_main(main)
