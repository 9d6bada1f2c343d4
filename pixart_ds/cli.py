"""The command `pixart-ds`: verbs, their options, and the exit codes; heavy imports wait inside the handlers."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixart_ds import __version__
from pixart_ds.doctor import options as doctor_options
from pixart_ds.errors import EXIT_CHECKPOINT, EXIT_DATA, EXIT_DONE, PixArtError
from pixart_ds.report.options import add_arguments

if TYPE_CHECKING:
    from pixart_ds.cluster.requests import Requests
    from pixart_ds.cluster.slurm import Slurm
    from pixart_ds.config.schema import ChainConfig, StageConfig
    from pixart_ds.layout import RunLayout

_EPILOG = (
    "exit codes: 0 done, 2 your config, 3 your machine, 4 your data, 5 a checkpoint, 70 our bug, "
    "75 stopped on request: start again"
)


def main(argv: list[str] | None = None) -> int:
    """Runs one verb; errors meant for people go to stderr, without a traceback."""
    options = _parser().parse_args(argv)
    options.arguments = sys.argv[1:] if argv is None else argv
    try:
        code: int = options.handler(options)
        return code
    except PixArtError as error:
        print(f"pixart-ds {options.verb}: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of our output has left: `pixart-ds status … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pixart-ds",
        description="Train PixArt-α: from pictures to a finished model.",
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    verb = _add(verbs, "demo", _demo, "the whole in small: draw, prepare, five stages, pictures, export, cost report")
    verb.add_argument(
        "--size", choices=("full", "smoke"), default="full", help="full learns (minutes); smoke only runs every part"
    )
    verb.add_argument("--images", type=Path, help="folder of your own pictures and captions instead of drawn ones")
    verb.add_argument(
        "--out",
        type=Path,
        help="folder for everything (default: demo-runs/SIZE or SIZE-s3); run again to go on where it stopped",
    )
    verb.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    verb.add_argument("--processes", type=_positive, default=2, help="ranks (default 2)")
    verb.add_argument(
        "--store",
        choices=("folder", "s3"),
        default="folder",
        help="where training reads from; s3: an object store that the demo starts (OpenStack Swift)",
    )

    verb = _add(verbs, "config", _config, "show a recipe as it resolves, or what is wrong with it")
    verb.add_argument("recipe", help="path or name of a recipe: stage2, chain, demo/prepare, …")
    _sets(verb)
    _json(verb)

    verb = _add(verbs, "estimate", _estimate, "what a stage or a chain will need and cost on given GPUs; a projection")
    verb.add_argument("recipe", help="path or name of a stage's or a chain's recipe: stage2, chain, …")
    _sets(verb)
    verb.add_argument("--gpu", help="v100-16gb, v100-32gb (default), a100-40gb, a100-80gb, h100 or h200")
    verb.add_argument(
        "--nodes",
        type=_nodes,
        metavar="N|MIN-MAX",
        help="a range lists what each size costs (default: as many GPUs as the paper had for the stage)",
    )
    verb.add_argument("--gpus-per-node", type=_positive, help="default 8")
    verb.add_argument("--profile", help="a site: its GPUs, country, PUE and price where no option names them")
    verb.add_argument("--country", help="whose electricity: ISO code of three letters, or WORLD")
    verb.add_argument("--pue", type=float, help="power usage effectiveness of the site")
    verb.add_argument("--price", type=float, dest="price_per_hour", help="dollars for a GPU-hour")
    _json(verb)

    verb = _add(verbs, "prepare", _prepare, "pictures and captions to a prepared set of latents and caption features")
    verb.add_argument("recipe", help="path or name of a prepare recipe")
    _sets(verb)
    verb.add_argument(
        "--only", choices=("scan", "caption", "encode", "finish"), help="one phase (default: all that is not done yet)"
    )
    verb.add_argument(
        "--task",
        type=_task,
        metavar="K/N",
        help="the K-th of N jobs that share the work, from 0: $SLURM_ARRAY_TASK_ID/64",
    )
    verb.add_argument(
        "--processes", type=_positive, default=1, help="that scan and encode; with cuda one for each GPU (default 1)"
    )
    verb.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the encoders compute")
    _dry_run(verb)
    _json(verb)

    verb = _add(verbs, "nouns", _nouns, "how rich captions are in nouns, beside the paper's data sets (Table 1)")
    verb.add_argument(
        "places",
        nargs="+",
        metavar="WHERE",
        help="folder or s3:// address of a prepared set, or a file: .parquet, .jsonl, .json, .csv, .tsv or .txt (a caption a line)",
    )
    verb.add_argument("--column", help="of the captions in the files (default: the first of caption, prompt, text)")
    verb.add_argument(
        "--tagger",
        type=Path,
        metavar="FOLDER",
        help="of NLTK's averaged_perceptron_tagger_eng (default: where NLTK looks, for example NLTK_DATA)",
    )
    verb.add_argument("--processes", type=_positive, default=1, help="that tag captions (default 1)")
    _json(verb)

    verb = _add(verbs, "verify", _verify, "read a whole prepared set and say all that is wrong with it, file and row")
    verb.add_argument("set", metavar="SET", help="folder or s3:// address of the prepared set")
    verb.add_argument(
        "--threads", type=_positive, default=2, metavar="N", help="that read; each holds one shard (default 2)"
    )
    _json(verb)

    verb = _add(verbs, "upload", _upload, "copy a prepared set into an object store; an interrupted upload goes on")
    verb.add_argument("set", type=Path, help="folder of the prepared set")
    verb.add_argument(
        "url", help="s3://bucket/prefix; endpoint, region and keys as boto3 takes them: AWS_ENDPOINT_URL_S3, …"
    )
    _dry_run(verb)
    _json(verb)

    verb = _add(
        verbs, "stage-in", _stage_in, "copy a stage's shards to where its cache is before it trains: here, or by a job"
    )
    verb.add_argument("run", type=Path, help="folder of the run")
    verb.add_argument("stage", help="name of the stage")
    verb.add_argument(
        "--nodes", metavar="N", help="that train the stage; with --profile in place of the profile's: 8 or 4-8"
    )
    verb.add_argument(
        "--node", type=_natural, metavar="K", help="which of the N this is, from 0: only the lanes that it reads"
    )
    verb.add_argument("--profile", help="submit a job that does it on the stage's nodes, for this site")
    verb.add_argument("--time", help="limit of the job, as sbatch reads it")
    _site_options(verb)
    _sets(verb, "execution.KEY=VALUE")
    _update_code(verb)
    _dry_run(verb)
    _json(verb)

    verb = _add(verbs, "create", _create, "freeze a chain's recipes into a new run folder")
    verb.add_argument("run", type=Path, help="folder of the run")
    verb.add_argument("--chain", required=True, help="path or name of a chain recipe: chain, demo/chain, …")
    _sets(verb, "STAGE.KEY=VALUE")
    _dry_run(verb)
    _json(verb)

    verb = _add(verbs, "change", _change, "change what a stage trains while it is under way, on record")
    verb.add_argument("run", type=Path, help="folder of the run")
    verb.add_argument("stage", help="name of the stage; no process trains it meanwhile")
    _sets(verb, "KEY=VALUE")
    verb.add_argument(
        "--allow",
        action="append",
        choices=("recipe", "dataset", "precision"),
        default=[],
        help="the kind of change that is meant; may be repeated",
    )
    _dry_run(verb)

    verb = _add(verbs, "budget", _budget, "what a run has used up of its budget, and other limits for it, on record")
    verb.add_argument("run", type=Path, help="folder of the run; it may be under way")
    _sets(verb, "LIMIT=NUMBER")
    _dry_run(verb)
    _json(verb)

    verb = _add(verbs, "train", _train, "run or resume one stage: the supervisor of one allocation")
    verb.add_argument("run", type=Path, help="folder of the run")
    verb.add_argument("stage", help="name of the stage")
    verb.add_argument(
        "--chain", help="make the run from this chain if it is not there; otherwise check that it is the same"
    )
    _sets(verb, "execution.KEY=VALUE")
    verb.add_argument(
        "--launcher",
        choices=("local", "srun"),
        default="local",
        help="local: processes of this machine; srun: one task per GPU",
    )
    verb.add_argument("--processes", type=_positive, help="ranks of the local launcher (default: GPUs, or 2 on a CPU)")
    others = verb.add_mutually_exclusive_group()
    others.add_argument(
        "--hosts",
        metavar="HOST,HOST,…",
        help="train on these machines together, without Slurm: this one leads, and calls the others by ssh",
    )
    others.add_argument(
        "--machines",
        type=_positive,
        metavar="N",
        help="the same on N machines, this one included, on each of which a person starts `pixart-ds join`",
    )
    verb.add_argument(
        "--rendezvous",
        metavar="HOST:PORT",
        help="where the others find this machine (with --hosts: its name, and any port that is free)",
    )
    verb.add_argument(
        "--ssh",
        metavar="PROGRAM",
        help="called in the place of ssh, may have options (default: $PIXART_DS_SSH, else ssh)",
    )
    _patience(verb, "how long the other machines are waited for")
    verb.add_argument(
        "--retries",
        type=_count,
        default=3,
        help="crashes in a row without a new checkpoint after which the ranks are started again (default: 3)",
    )
    verb.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    verb.add_argument(
        "--tasks-per-node", type=_positive, metavar="N", help="ranks of the srun launcher on each node (default: GPUs)"
    )
    verb.add_argument(
        "--warning",
        type=_positive,
        default=300,
        metavar="SECONDS",
        help="before the job's time limit, when all ranks save (default: 300)",
    )
    verb.add_argument(
        "--container",
        metavar="COMMAND",
        help="of the srun launcher: what starts a rank inside a container, such as 'apptainer exec --nv /path/pixart.sif'",
    )
    verb.add_argument(
        "--successor",
        action="store_true",
        help="where Slurm's jobs cannot be requeued: keep a second job of the same name waiting behind this one",
    )
    _update_code(verb)
    _dry_run(verb)

    verb = _add(
        verbs,
        "join",
        _join,
        "this machine's ranks of a stage that `train --machines` leads on another one, without Slurm",
    )
    verb.add_argument("run", type=Path, help="folder of the run; all machines share it")
    verb.add_argument("stage", help="name of the stage")
    verb.add_argument("--rendezvous", required=True, metavar="HOST:PORT", help="as the leader was told")
    verb.add_argument("--processes", type=_positive, help="ranks of this machine (default: GPUs, or 2 on a CPU)")
    verb.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="as the leader's")
    verb.add_argument("--name", help="what the leader calls this machine (default: its hostname)")
    _patience(verb, "how long a leader is waited for, also after one that was lost")
    verb.add_argument("--once", action="store_true", help="end when the leader is lost, and wait for no other")
    verb.set_defaults(update_code=False, dry_run=False)

    verb = _add(verbs, "launch", _launch, "submit a stage's job to Slurm, for a site as its profile describes it")
    verb.add_argument("stage", help="name of the stage")
    verb.add_argument("--profile", required=True, help="path of a profile, or name of one in slurm/profiles/")
    verb.add_argument(
        "--run", type=Path, help="folder of the run (default: $RUN, else runs/first, as in slurm/setup.sh)"
    )
    verb.add_argument("--nodes", help="8, or 4-8 for what can be had between the two")
    verb.add_argument("--time", help="limit of one attempt, as sbatch reads it: HH:MM:SS, D-HH:MM:SS, minutes")
    _site_options(verb)
    _sets(verb, "execution.KEY=VALUE")
    _update_code(verb)
    _dry_run(verb)
    _json(verb)

    verb = _add(
        verbs,
        "chain",
        _chain,
        "submit all stages, each behind the one before; run it again, and it mends what is broken",
    )
    verb.add_argument("recipe", help="path or name of a chain recipe, or folder of a run that is there")
    verb.add_argument("--profile", required=True, help="path of a profile, or name of one in slurm/profiles/")
    verb.add_argument(
        "--run", type=Path, help="folder of the run (default: $RUN, else runs/first, as in slurm/setup.sh)"
    )
    verb.add_argument(
        "--after",
        action="append",
        default=[],
        metavar="[STAGE=]JOB",
        help="a job, or an array such as one that prepares the data, that must end well before the stage (default: the first)",
    )
    verb.add_argument("--retry", action="store_true", help="submit a stage that has failed once more")
    _site_options(verb)
    _sets(verb, "STAGE.KEY=VALUE")
    _update_code(verb)
    _dry_run(verb)
    _json(verb)

    verb = _add(verbs, "cancel", _cancel, "end a run's jobs: those that wait at once, those that train after a save")
    verb.add_argument("run", type=Path, help="folder of the run")
    verb.add_argument("--stage", help="only this stage")
    verb.add_argument("--now", action="store_true", help="leave ranks no more than Slurm's KillWait to save")
    _dry_run(verb)
    _json(verb)

    verb = _add(verbs, "doctor", _doctor, "whether this machine can train a stage: GPUs, disks, network, sets, Slurm")
    doctor_options.add_arguments(verb)

    verb = _add(
        verbs, "status", _status, "where a run stands: stages, jobs, time left, cost, warnings, and what to do next"
    )
    verb.add_argument("run", type=Path, help="folder of the run")
    verb.add_argument(
        "--watch",
        type=_positive,
        nargs="?",
        const=10,
        metavar="SECONDS",
        help="show it again every so many seconds (default 10) until the run is done; end it with Ctrl-C",
    )
    _json(verb)

    verb = _add(verbs, "cost", _cost, "what runs cost: device-days, energy, CO2e, money, and where the time went")
    add_arguments(verb)

    verb = _add(verbs, "audit", _audit, "prove from the logs which samples each step used, none lost and none repeated")
    verb.add_argument("run", type=Path, help="folder of the run")
    verb.add_argument("--stage", help="only this stage (default: all that have begun)")
    verb.add_argument(
        "--step", type=_positive, metavar="K", help="list the samples of step K instead; steps count from 1"
    )
    verb.add_argument(
        "--from",
        type=_natural,
        dest="after",
        default=0,
        metavar="IMAGES",
        help="recompute only what came after so many images",
    )
    verb.add_argument("--to", type=_positive, dest="upto", metavar="IMAGES", help="recompute only up to so many images")
    verb.add_argument(
        "--processes",
        type=_positive,
        default=1,
        help="processes that recompute (default 1); each does 0.3 to 0.8 million samples a second in batches of hundreds or more",
    )
    _json(verb)

    verb = _add(verbs, "checkpoint", _checkpoint, "list, verify or show the checkpoints of a run")
    verb.add_argument(
        "action", choices=("list", "verify", "show"), help="verify reads every file and compares checksums"
    )
    verb.add_argument(
        "path", help="folder of a run; for verify and show also folder or s3:// address of one checkpoint"
    )
    verb.add_argument("--stage", help="only this stage of the run")
    _json(verb)

    verb = _add(verbs, "sample", _sample, "pictures from a run, a checkpoint, a handover or an exported folder")
    _weights_source(verb)
    verb.add_argument("--prompt", action="append", default=[], help="may be repeated; default: the set's held prompts")
    shape = verb.add_mutually_exclusive_group()
    shape.add_argument("--size", help="HxW in pixels (default: the stage's square)")
    shape.add_argument("--ratio", type=float, help="height / width: the size of the nearest of the paper's buckets")
    verb.add_argument("--guidance-scale", type=float)
    verb.add_argument("--steps", type=_positive, help="denoising steps")
    verb.add_argument("--scheduler", help="class name of a diffusers scheduler (default: the recipe's, DPM-Solver++)")
    verb.add_argument(
        "--null-caption",
        choices=("encoder", "weights"),
        help="what guidance leads away from: the encoder's empty caption, or the weights' stored one",
    )
    verb.add_argument("--seed", type=int)
    verb.add_argument("--vae", help="folder of the AutoencoderKL (default: the one that prepared the set)")
    verb.add_argument("--text-encoder", help="folder of the T5 encoder (default: the one that prepared the set)")
    verb.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    verb.add_argument("--out", type=Path, required=True, help="PNG of the grid")
    _json(verb)

    verb = _add(
        verbs, "export", _export, "weights as a diffusers PixArtAlphaPipeline folder, or under the official names"
    )
    _weights_source(verb)
    verb.add_argument(
        "--format", choices=("diffusers", "official"), default="diffusers", help="official: one .safetensors or .pth"
    )
    verb.add_argument("--vae", help="folder of the AutoencoderKL (default: the one that prepared the set)")
    verb.add_argument("--text-encoder", help="folder of the T5 encoder (default: the one that prepared the set)")
    verb.add_argument("--out", type=Path, help="folder or file (default for a run: RUN/export)")
    _dry_run(verb)
    _json(verb)

    verb = _add(
        verbs, "import", _import, "weights from elsewhere as a handover: PixArt or DiT files, diffusers folders"
    )
    verb.add_argument("source", type=Path, help=".pth, .pt, .safetensors, or a diffusers folder")
    verb.add_argument("--out", type=Path, required=True, help="folder of the handover")
    verb.add_argument(
        "--image-size",
        type=int,
        choices=(256, 512, 1024),
        help="pixels they were trained for, where they do not say it",
    )
    verb.add_argument("--licence", help="of these weights; recorded with all that is trained from them")
    _sets(verb, "MODEL_KEY=VALUE")
    _dry_run(verb)
    _json(verb)
    return parser


def _weights_source(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("source", type=Path, help="folder of a run, a checkpoint, a handover, or an export")
    verb.add_argument("--stage", help="stage of the run (default: the last that has weights)")
    verb.add_argument("--weights", choices=("ema", "raw"), default="ema")


def _add(verbs: Any, name: str, handler: Any, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False
    )
    parser.set_defaults(handler=handler)
    return parser


def _sets(verb: argparse.ArgumentParser, form: str = "KEY.PATH=VALUE") -> None:
    verb.add_argument(
        "--set", dest="sets", action="append", default=[], metavar=form, help="override a key; may be repeated"
    )


def _site_options(verb: argparse.ArgumentParser) -> None:
    for name in ("partition", "account", "qos", "constraint"):
        verb.add_argument(f"--{name}", help="in place of the profile's")


def _json(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--json", action="store_true", help="print the answer as JSON")


def _dry_run(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")


def _update_code(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--update-code",
        action="store_true",
        help="run this code from now on, in place of the copy in the run's folder; recorded there",
    )


def _patience(verb: argparse.ArgumentParser, what: str) -> None:
    verb.add_argument("--patience", type=_positive, default=600, metavar="SECONDS", help=f"{what} (default: 600)")


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text} is no number from 0 on")
    return int(text)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def _nodes(text: str) -> int | tuple[int, int]:
    """`N`, or `MIN-MAX` as Slurm's `--nodes` takes it: 4, or (4, 8)."""
    fewest, dash, most = text.partition("-")
    if not fewest.isdecimal() or (dash and not most.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of nodes (8) nor a range of them (4-8)")
    if not dash:
        return _positive(fewest)
    bounds = _positive(fewest), _positive(most)
    if bounds[0] > bounds[1]:
        raise argparse.ArgumentTypeError(f"{text}: the range ends below its start; did you mean {most}-{fewest}?")
    return bounds


def _task(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and int(number) < int(count)):
        raise argparse.ArgumentTypeError(f"{text} is not K/N with K from 0 to N - 1")
    return int(number), int(count)


def _natural(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is not at least 0")
    return number


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _demo(options: argparse.Namespace) -> int:
    from pixart_ds.demo.run import Demo

    out = options.out or Path("demo-runs") / (
        options.size if options.store == "folder" else f"{options.size}-{options.store}"
    )
    return Demo(
        out,
        size=options.size,
        images=options.images,
        device=options.device,
        processes=options.processes,
        store=options.store,
    ).run()


def _config(options: argparse.Namespace) -> int:
    from pixart_ds.config.load import dump_yaml, find_recipe, load_chain, load_prepare, load_stage, read_layers
    from pixart_ds.config.schema import PrepareConfig

    keys = read_layers(find_recipe(options.recipe))
    config: ChainConfig | PrepareConfig | StageConfig
    if "stages" in keys:
        config = load_chain(options.recipe, options.sets)
    elif "source" in keys and "latents" in keys:
        config = load_prepare(options.recipe, options.sets)
    else:
        config = load_stage(options.recipe, options.sets)
    if options.json:
        _print_json(config.model_dump(mode="json"))
    else:
        print(dump_yaml(config), end="")
    return EXIT_DONE


def _estimate(options: argparse.Namespace) -> int:
    from pixart_ds.plan.estimate import Machines, estimate, estimate_sizes
    from pixart_ds.plan.estimate_report import report

    names = ("gpu", "gpus_per_node", "country", "pue", "price_per_hour")
    given = {name: getattr(options, name) for name in names}
    if options.profile is not None:
        site = _site_of(options.profile)
        given = {name: site[name] if value is None else value for name, value in given.items()}
    if isinstance(options.nodes, tuple):
        values = estimate_sizes(options.recipe, options.sets, Machines(**given), *options.nodes)
    else:
        values = estimate(options.recipe, options.sets, Machines(**given, nodes=options.nodes))
    _print_json(values) if options.json else print(report(values))
    return EXIT_DONE


def _site_of(name: str) -> dict[str, Any]:
    """What a profile says of GPUs and costs; None where it says nothing."""
    from pixart_ds.config.profile import load_profile
    from pixart_ds.errors import ConfigError

    profile = load_profile(name)
    if profile.gpu is None:
        raise ConfigError(f"the profile {name} names no gpu", remedy="estimate for one: --gpu v100-32gb")
    return {"gpu": profile.gpu, "gpus_per_node": profile.gpus_per_node, **profile.cost.model_dump()}


def _prepare(options: argparse.Namespace) -> int:
    from pixart_ds.config.load import load_prepare
    from pixart_ds.prepare import pipeline

    config = load_prepare(options.recipe, options.sets)
    if options.dry_run:
        plan = pipeline.dry_run(config, options.processes)
        _print_json(plan) if options.json else print(pipeline.words_of(plan))
        return EXIT_DONE
    task = pipeline.Task(*options.task) if options.task else None
    report = pipeline.prepare(config, only=options.only, task=task, processes=options.processes, device=options.device)
    if options.json:
        _print_json(report.to_json())
        return EXIT_DONE
    if report.page:
        print(f"{report.page}\n")
    print(report)
    return EXIT_DONE


def _nouns(options: argparse.Namespace) -> int:
    from pixart_ds.prepare.nouns import count_nouns

    found = count_nouns(options.places, column=options.column, tagger=options.tagger, processes=options.processes)
    _print_json(found.to_json()) if options.json else print(found)
    return EXIT_DONE


def _verify(options: argparse.Namespace) -> int:
    from contextlib import ExitStack

    from pixart_ds.log import Work
    from pixart_ds.prepare.verify import verify

    with ExitStack() as shown:
        work: Work | None = None

        def tell(done: int, total: int) -> None:
            nonlocal work
            work = work or shown.enter_context(Work("verify", total, "rows", program="verify"))
            work.advance(done - work.done)

        found = verify(options.set, threads=options.threads, report=tell)
    _print_json(found.to_json()) if options.json else print(found)
    return EXIT_DONE if found.sound else EXIT_DATA


def _upload(options: argparse.Namespace) -> int:
    from pixart_ds.data.store import upload_folder
    from pixart_ds.log import Log

    log = Log("upload", None if options.json else sys.stdout)
    done = upload_folder(options.set, options.url, report=log.event, dry_run=options.dry_run)
    _print_json(done.to_json()) if options.json else print(done)
    return EXIT_DONE


def _stage_in(options: argparse.Namespace) -> int:
    from pixart_ds.cluster.jobs import cache_settings
    from pixart_ds.cluster.stage_in_job import submit
    from pixart_ds.cluster.submit import with_options
    from pixart_ds.config.freeze import open_run, override_execution, read_stage
    from pixart_ds.config.profile import load_profile
    from pixart_ds.train.stage_in import check_folder, needless

    run, profile = open_run(options.run), None
    given = {name: getattr(options, name) for name in ("nodes", "time", "partition", "account", "qos", "constraint")}
    sets = list(options.sets)
    if options.profile is not None:
        profile = with_options(load_profile(options.profile), options.stage, given, "the command line")
        sets = [*cache_settings(profile), *sets]
    stage = override_execution(read_stage(run, options.stage), sets)
    if (why := needless(stage)) is not None:
        text = f"nothing to stage in for {stage.name}: {why}"
        _print_json({"staged": False, "why": why}) if options.json else print(text)
        return EXIT_DONE
    check_folder(stage)
    if profile is None:
        return _stage_in_here(options, stage)
    done = submit(run, stage, profile, options.sets, dry_run=options.dry_run, update_code=options.update_code)
    if options.json:
        _print_json(done.to_json())
        return EXIT_DONE
    if options.dry_run:
        print(done.text, end="")
    if done.job is not None:
        output = done.output.with_name(f"{done.job}.out")
        print(f"job {done.job}: {done.spec.name} on {done.spec.nodes} nodes; its output: {output}")
        chain = f"pixart-ds chain {run.root} --profile {options.profile} --after {stage.name}={done.job}"
        print(f"to have the stage wait for it: {chain}")
    for note in done.notes:
        print(f"note: {note}", file=sys.stderr)
    return EXIT_DONE


def _stage_in_here(options: argparse.Namespace, stage: StageConfig) -> int:
    from pixart_ds.log import Log
    from pixart_ds.train.stage_in import fill_here, part_of

    log = Log("stage-in", sys.stderr if options.json else sys.stdout)
    done = fill_here(stage, part_of(options.nodes, options.node), log.event, dry_run=options.dry_run)
    _print_json({"staged": True, **done.to_json()}) if options.json else log.event(str(done))
    return EXIT_DONE


def _create(options: argparse.Namespace) -> int:
    from pixart_ds.config.freeze import check_run, create_run
    from pixart_ds.config.load import load_chain
    from pixart_ds.layout import RunLayout

    chain = load_chain(options.chain, options.sets)
    if options.dry_run:
        if RunLayout(options.run).manifest.exists():
            check_run(RunLayout(options.run), chain)
    else:
        _tell_of_budget(create_run(options.run, chain, options.chain), chain)
    if options.json:
        _print_json({"run": str(options.run), "chain": chain.model_dump(mode="json"), "created": not options.dry_run})
    else:
        print(
            f"{'would make' if options.dry_run else 'run'} {options.run}: {', '.join(stage.name for stage in chain.stages)}"
        )
    return EXIT_DONE


def _change(options: argparse.Namespace) -> int:
    from pixart_ds.config.change import change_stage
    from pixart_ds.config.freeze import open_run
    from pixart_ds.log import Log
    from pixart_ds.train.attempt import refuse_others

    run = open_run(options.run)
    if not options.dry_run:
        refuse_others(run.stage(options.stage), Log(options.stage, sys.stderr))
    lines = change_stage(run, options.stage, options.sets, options.allow, dry_run=options.dry_run)
    for line in lines or ["the content of its sets may be another"]:
        print(f"{options.stage}: {line}" + (" (would change)" if options.dry_run else ""))
    return EXIT_DONE


def _budget(options: argparse.Namespace) -> int:
    from pixart_ds.config.budget import change_budget, read_budget
    from pixart_ds.config.freeze import open_run
    from pixart_ds.ledger.budget import amounts, rows, spent
    from pixart_ds.page.words import digits
    from pixart_ds.report.text import budget_lines

    run = open_run(options.run)
    changed = change_budget(run, options.sets, dry_run=options.dry_run)
    limits, found = read_budget(run).limits, spent(run.root)
    held, used = rows(limits, found.account), amounts(found.account)
    if options.json:
        answer = {"run": str(run.root), "limits": limits, "used": used, "budget": held, "changed": changed}
        _print_json({**answer, "done": bool(changed) and not options.dry_run, "unknown": list(found.unknown)})
        return EXIT_DONE
    for line in changed:
        print(line + (" (would change)" if options.dry_run else ""))
    for line in budget_lines(held):
        print(line)
    if free := {what: value for what, value in used.items() if what not in limits}:
        print("Without a limit: " + ", ".join(f"{digits(value)} {what}" for what, value in free.items()))
    for why in found.unknown:
        print(f"note: {why}", file=sys.stderr)
    return EXIT_DONE


def _tell_of_budget(run: RunLayout, chain: ChainConfig) -> None:
    """Says that a run keeps its own budget, where the chain has another one."""
    from pixart_ds.config.budget import read_budget

    if chain.budget is not None and chain.budget != read_budget(run):
        print(
            f"note: the run keeps its own budget, not the chain's; see and change it: pixart-ds budget {run.root}",
            file=sys.stderr,
        )


def _train(options: argparse.Namespace) -> int:
    from pixart_ds.cluster.requests import Requests

    with Requests() as requests:  # before anything slow: a signal meanwhile must be neither lost nor the end
        return _train_on(options, requests)


def _train_on(options: argparse.Namespace, requests: Requests) -> int:
    from pixart_ds.cluster.launchers import LocalLauncher
    from pixart_ds.cluster.machines import MachinesLauncher, machines_launcher
    from pixart_ds.cluster.slurm import Slurm
    from pixart_ds.cluster.srun import SrunLauncher, rank_command
    from pixart_ds.cluster.supervise import Timing, supervise
    from pixart_ds.config.freeze import create_run, open_run, override_execution, read_stage
    from pixart_ds.config.load import load_chain
    from pixart_ds.errors import ConfigError
    from pixart_ds.log import ProgressBar
    from pixart_ds.train.preflight import preflight

    if options.chain and not options.dry_run:
        chain = load_chain(options.chain)
        _tell_of_budget(create_run(options.run, chain, options.chain), chain)
    # of another launcher's ranks the job knows nothing: it may be a person's own session
    run, slurm = open_run(options.run), Slurm.of_this_job() if options.launcher == "srun" else None
    _run_frozen(run, slurm, requests, options)
    stage = override_execution(read_stage(run, options.stage), options.sets)
    preflight(run, stage, options.device)
    extra = [word for each in options.sets for word in ("--set", each)]
    layout = run.stage(stage.name)
    launcher: LocalLauncher | SrunLauncher | MachinesLauncher
    if options.launcher == "srun":
        if options.hosts or options.machines:
            raise ConfigError(
                "--launcher srun takes its machines from Slurm", remedy="leave --hosts and --machines out"
            )
        launcher = SrunLauncher(
            extra=extra,
            tasks_per_node=options.tasks_per_node,
            slurm=slurm,
            command=rank_command(options.container),
        )
    elif options.container:
        raise ConfigError(
            "--container is for --launcher srun", remedy="start pixart-ds itself inside the container instead"
        )
    else:
        local = LocalLauncher(options.processes or _default_processes(options.device), extra=extra)
        launcher = machines_launcher(local, layout, options) or local
    if options.dry_run:
        print(
            f"would run {stage.name} of {run.root} ({stage.total_steps} steps of {stage.global_batch_size} images) with {launcher}"
        )
        return EXIT_DONE
    if isinstance(launcher, SrunLauncher):
        launcher.tasks()  # refuses what is no allocation before an attempt begins

    def attempt() -> int:
        return supervise(
            run.root,
            stage.name,
            launcher=launcher,
            device=options.device,
            timing=Timing(retries=options.retries, walltime_margin_s=float(options.warning)),
            deadlines=stage.execution.deadlines,
            requests=requests,
            slurm=slurm,
            successor=options.successor,
        )

    with ProgressBar(layout.attempts, stage.total_images, stage.name):
        return launcher.lead(requests, attempt) if isinstance(launcher, MachinesLauncher) else attempt()


def _join(options: argparse.Namespace) -> int:
    from pixart_ds.cluster.join import Agent, this_machine
    from pixart_ds.cluster.launchers import LocalLauncher
    from pixart_ds.cluster.requests import Requests
    from pixart_ds.cluster.wire import Address
    from pixart_ds.config.freeze import open_run, read_stage
    from pixart_ds.log import Log
    from pixart_ds.train.preflight import preflight

    leader = Address.parse(options.rendezvous)
    with Requests() as requests:
        run = open_run(options.run)
        _run_frozen(run, None, requests, options)
        stage = read_stage(run, options.stage)
        preflight(run, stage, options.device)  # what is missing here is best told here
        processes = options.processes or _default_processes(options.device)
        own = this_machine(processes, options.device, options.name)
        log = Log(stage.name)
        launcher = LocalLauncher(processes)
        return Agent(
            run.root, stage.name, leader, own, requests, log, float(options.patience), options.once, launcher=launcher
        ).work()


def _run_frozen(run: RunLayout, slurm: Slurm | None, requests: Requests, options: argparse.Namespace) -> None:
    """Becomes the run's own copy of the code, if it has one; a job makes it at its first start."""
    from pixart_ds.cluster import frozen

    if options.dry_run:
        return
    if slurm is None and not options.update_code:
        code = frozen.current(run)
    else:
        by = "train" if slurm is None else f"job {slurm.job}"
        code = frozen.freeze(run, by, update=options.update_code)
        if code.new:
            print(f"the code is frozen into the run: {code}; later changes need --update-code", flush=True)
    if code is not None and not frozen.runs_here(code):
        arguments = [each for each in options.arguments if each != "--update-code"]
        frozen.replace_process(code, arguments, requests.hold())


def _launch(options: argparse.Namespace) -> int:
    from pixart_ds.cluster.submit import launch, with_options
    from pixart_ds.config.freeze import open_run, override_execution, read_stage
    from pixart_ds.config.profile import load_profile
    from pixart_ds.train.preflight import preflight

    names = ("nodes", "time", "partition", "account", "qos", "constraint")
    given = {name: getattr(options, name) for name in names}
    profile = with_options(load_profile(options.profile), options.stage, given, "the command line")
    run = open_run(options.run or Path(os.environ.get("RUN", "runs/first")))
    stage = override_execution(read_stage(run, options.stage), options.sets)
    preflight(run, stage, profile.device)
    done = launch(run, stage, profile, options.sets, dry_run=options.dry_run, update_code=options.update_code)
    if options.json:
        _print_json(done.to_json())
        return EXIT_DONE
    if options.dry_run:
        print(done.text, end="")
    for number, job in enumerate(done.jobs):
        waits = (
            " waits behind it"
            if number
            else f": {done.spec.name} on {done.spec.nodes} nodes, {done.spec.time} an attempt"
        )
        print(f"job {job}{waits}")
    if done.jobs:
        print(f"code {done.code}; its output: {run.stage(stage.name).submissions / done.jobs[0]}.out")
    for note in done.notes:
        print(f"note: {note}", file=sys.stderr)
    return EXIT_DONE


def _chain(options: argparse.Namespace) -> int:
    from functools import partial

    from pixart_ds.cluster.chain import Wishes, after_of, page, run_chain
    from pixart_ds.cluster.submit import with_options
    from pixart_ds.config.profile import load_profile
    from pixart_ds.train.preflight import preflight

    names = ("partition", "account", "qos", "constraint")
    given = {name: getattr(options, name) for name in names}
    profile = with_options(load_profile(options.profile), None, given, "the command line")
    run = _run_of_chain(options)
    wishes = Wishes(after_of(run, options.after), options.retry, options.update_code, options.dry_run)
    found = run_chain(run, profile, wishes, partial(preflight, run))
    if options.json:
        _print_json({"run": str(run.root), "stages": [done.to_json() for done in found]})
    else:
        again = f"pixart-ds chain {run.root} --profile {options.profile}"
        print("\n".join(page(found, run, again, dry_run=options.dry_run)))
    return max((done.exit_code for done in found), default=EXIT_DONE)


def _run_of_chain(options: argparse.Namespace) -> RunLayout:
    """The run that is there, or that is made of the recipe."""
    from pixart_ds.config.freeze import check_run, create_run, open_run
    from pixart_ds.config.load import load_chain
    from pixart_ds.errors import ConfigError
    from pixart_ds.layout import RunLayout

    folder = Path(options.recipe)
    if RunLayout(folder).manifest.exists():
        if options.sets or (options.run is not None and options.run.absolute() != folder.absolute()):
            raise ConfigError("the run is there already: --run and --set are for one that is made", where=folder)
        return open_run(folder)
    chain = load_chain(options.recipe, options.sets)
    run = RunLayout(options.run or Path(os.environ.get("RUN", "runs/first")))
    if run.manifest.exists():
        check_run(run, chain)
        return run
    if options.dry_run:
        raise ConfigError(
            "there is no run yet",
            where=run.root,
            remedy=f"make it: pixart-ds create {run.root} --chain {options.recipe}",
        )
    return create_run(run.root, chain, options.recipe)


def _cancel(options: argparse.Namespace) -> int:
    from pixart_ds import files
    from pixart_ds.cluster.cancel import cancel
    from pixart_ds.config.freeze import open_run, read_stage

    run = open_run(options.run)
    stages = files.read_json(run.manifest)["stages"] if options.stage is None else [read_stage(run, options.stage).name]
    found = cancel(run, stages, now=options.now, dry_run=options.dry_run)
    if options.json:
        _print_json([each.to_json() for each in found])
        return EXIT_DONE
    for each in found:
        print(f"{each.stage}: job {each.job} {'would be' if options.dry_run else 'is'} {each.how}")
    if not found:
        print("the run has no jobs in the queue")
    elif any(each.how == "asked to save" for each in found):
        print("they end when that is done; `pixart-ds status` shows it")
    return EXIT_DONE


def _default_processes(device: str) -> int:
    if device == "cpu":
        return 2
    import torch  # only to count the GPUs of this machine

    return max(1, torch.cuda.device_count())


def _doctor(options: argparse.Namespace) -> int:
    from pixart_ds.doctor import command

    return command.run(options)


def _status(options: argparse.Namespace) -> int:
    from pixart_ds.cluster.status import run_status
    from pixart_ds.cluster.status_text import show
    from pixart_ds.config.freeze import open_run

    run = open_run(options.run)
    show(lambda: run_status(run), every_s=options.watch, as_json=options.json)
    return EXIT_DONE


def _cost(options: argparse.Namespace) -> int:
    from pixart_ds.report import command

    return command.run(options)


def _audit(options: argparse.Namespace) -> int:
    from pixart_ds.train.audit import Part, audit_run, show_step
    from pixart_ds.train.audit_report import page, step_table

    if options.step is not None:
        answer, text = show_step(options.run, options.stage, options.step), step_table
    else:
        part = Part(options.after, options.upto)
        answer, text = audit_run(options.run, options.stage, part, options.processes), page
    _print_json(answer) if options.json else print(text(answer))
    return EXIT_DONE if answer["proven"] else EXIT_DATA


def _checkpoint(options: argparse.Namespace) -> int:
    from pixart_ds.config.freeze import open_run
    from pixart_ds.train import checkpoints

    if options.action == "list":
        rows = checkpoints.list_checkpoints(open_run(Path(options.path)), options.stage)
        _print_json(rows) if options.json else print(checkpoints.table(rows))
        return EXIT_DONE
    if options.action == "show":
        shown = checkpoints.show_checkpoint(options.path)
        _print_json(shown) if options.json else print(checkpoints.page(shown))
        return EXIT_DONE
    rows = checkpoints.verify_checkpoints(options.path, options.stage)
    if options.json:
        _print_json(rows)
    else:
        for row in rows:
            print(f"{row['path']}: {row['problem'] or 'whole'}")
    return EXIT_CHECKPOINT if any(row["problem"] for row in rows) else EXIT_DONE


def _sample(options: argparse.Namespace) -> int:
    from pixart_ds.evaluate.command import sample_weights

    answer = sample_weights(options)
    _print_json(answer) if options.json else print(
        f"{answer['pictures']} pictures of {answer['stage'] or answer['source']}: {answer['out']}"
    )
    return EXIT_DONE


def _export(options: argparse.Namespace) -> int:
    from pixart_ds.export.command import export_weights

    answer = export_weights(options)
    if options.json:
        _print_json(answer)
    else:
        did = "would write" if options.dry_run else "wrote"
        print(f"{did} the {answer['weights']} weights of {answer['stage'] or answer['source']} to {answer['out']}")
        for licence in answer["licences"]:
            print(f"licence of weights that they come from: {licence}")
    return EXIT_DONE


def _import(options: argparse.Namespace) -> int:
    from pixart_ds.export.command import import_weights

    answer = import_weights(options)
    if options.json:
        _print_json(answer)
    else:
        did = "would write" if options.dry_run else "wrote"
        kinds = " and ".join(answer["weights"])
        print(f"{did} {answer['out']}: {kinds} weights of a {answer['model']['kind']} ({answer['layout']})")
        print(f"licence: {answer['licence']}")
    return EXIT_DONE
