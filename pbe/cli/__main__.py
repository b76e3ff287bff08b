"""`pbe`: the command line. Argument parsing and printing; the work is in the modules it calls."""

import argparse
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from pbe.cli.arguments import at_least, refuse_unwritable_png
from pbe.cli.edit import add_edit_parser
from pbe.cli.find import add_find_parser, add_index_parser
from pbe.cli.import_study import add_import_study_parser
from pbe.cli.page import add_page_parser
from pbe.errors import UserError, printable

if TYPE_CHECKING:
    from pbe.cli.edit_table import OnRay


def main(argv: list[str] | None = None, *, on_ray: "OnRay | None" = None) -> int:
    """on_ray: edits the rows of a table in Ray actors; pbe itself does not know Ray (pipelines/commands/pbe.py)."""
    parser = argparse.ArgumentParser(prog="pbe", description="Paint by Example: exemplar-based image editing")
    commands = parser.add_subparsers(dest="command", required=True)
    add_edit_parser(commands)
    add_page_parser(commands)
    add_index_parser(commands)
    add_find_parser(commands)
    export = commands.add_parser("export", help="write a trained model as a folder of the hub's layout, with a card")
    export.add_argument("model", help="variant, e.g. full, or a model folder")
    export.add_argument("--out", type=Path, required=True, help="new folder")
    export.add_argument("--half", action="store_true", help="store the UNet in float16: half the size")
    export.set_defaults(run=_export)
    rejects = commands.add_parser("rejects", help="list what the data stages dropped, by reason, with examples")
    rejects.add_argument("--examples", type=at_least(0, int), default=3, help="rows shown per reason")
    rejects.add_argument("--out", type=Path, default=None, help="CSV to write, with every row")
    rejects.set_defaults(run=_rejects)
    show = commands.add_parser("show", help="show what a stage made as a picture")
    show.add_argument("what", choices=["triplets"])
    show.add_argument("--ids", nargs="+", default=[], metavar="ID", help="photos to show; default: random rows")
    show.add_argument("--rows", type=at_least(1, int), default=12, help="number of columns in the picture")
    show.add_argument("--seed", type=at_least(0, int), default=0, help="seed of the random rows")
    show.add_argument("--out", type=Path, required=True, help="PNG to write")
    show.set_defaults(run=_show)
    doctor = commands.add_parser("doctor", help="check this machine and the settings before a run")
    doctor.add_argument(
        "--gpu", action="store_true", help="also check nccl, bf16, sdpa, and which profiles fit; train on all GPUs"
    )
    doctor.add_argument("--ranks", type=at_least(1, int), help="also train briefly with this many ranks (CPU: gloo)")
    doctor.set_defaults(run=_doctor)
    collect = commands.add_parser(
        "gc", help="remove parts and runs of the storage that no manifest in git's history refers to"
    )
    collect.add_argument("--yes", action="store_true", help="remove; without it, only list")
    collect.add_argument("--older-than-h", type=at_least(0, float), default=24.0, help="least age, hours; default: 24")
    collect.add_argument(
        "--no-run-cache",
        action="store_true",
        help="also remove what only DVC's run cache refers to",
    )
    collect.add_argument(
        "--forget-missing", action="store_true", help="ignore manifests that DVC's cache lacks, and what only they name"
    )
    collect.set_defaults(run=_gc)
    imports = commands.add_parser("import", help="convert published weights to a folder that pbe opens")
    imports.add_argument(
        "source", type=Path, help="a checkpoint of Paint by Example or SD 1.x, a hub folder, or an adapter's folder"
    )
    imports.add_argument("--base", type=Path, help="of an adapter: the folder of the model that it was trained on")
    imports.add_argument("--out", type=Path, required=True, help="folder to write, new or empty")
    imports.set_defaults(run=_import)
    mixture = commands.add_parser("import-mixture", help="convert the published mixture of QS, a pickle, to arrays")
    mixture.add_argument("source", type=Path, help="a pickled GaussianMixture of scikit-learn; its code is not run")
    mixture.add_argument("--out", type=Path, required=True, help=".npz to write, for `mixture` of the extractor clip")
    mixture.set_defaults(run=_import_mixture)
    add_import_study_parser(commands)
    args = parser.parse_args(argv)
    args.on_ray = on_ray
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Image size .* exceeds limit")  # Pillow's, above 89 megapixels
            return args.run(args) or 0
    except KeyboardInterrupt:
        print("pbe: interrupted", file=sys.stderr)
        return 130
    except (UserError, ValueError, OSError) as error:
        print(f"pbe: error: {printable(' '.join(_with_cure(error).splitlines()))}", file=sys.stderr)
        return 1
    return 0


def _with_cure(error: Exception) -> str:
    from pbe.store import PartError

    if isinstance(error, PartError) and error.kind == "embeddings":
        return f"{error}; `pbe index` makes it again"
    if isinstance(error, PartError):  # the commands here read parts of data stages, whose kind is the stage
        return f"{error}; `dvc repro -f -s {error.kind}` makes it again"
    return str(error)


def _export(args: argparse.Namespace) -> None:
    from pbe.export import export_model
    from pbe.model.weights import opens_in_diffusers
    from pbe.places import repo_root

    model = export_model(repo_root(), args.model, args.out, half=args.half)
    where = "diffusers and pbe open it" if opens_in_diffusers(model) else "pbe opens it, diffusers has no class for it"
    print(f"wrote {args.out}; {where}")


def _rejects(args: argparse.Namespace) -> None:
    from pbe.places import repo_root, storage_uri
    from pbe.rejects import count_rejects, made_from_earlier_input, stages_with_rejects, table_text, write_rejects
    from pbe.store import Store

    manifests, store = stages_with_rejects(repo_root()), Store(storage_uri())
    if not manifests:
        raise ValueError("no data stage has run here; run `dvc repro ingest` first")
    reasons = count_rejects(store, manifests, examples=args.examples)
    print(table_text(reasons, manifests, made_from_earlier_input(repo_root())))
    if args.out is not None:
        print(f"wrote {write_rejects(store, manifests, args.out)} rows to {args.out}")


def _show(args: argparse.Namespace) -> None:
    from pbe.data import images
    from pbe.places import repo_root, storage_uri
    from pbe.show import show_triplets
    from pbe.store import Store, load_manifest, write_whole

    refuse_unwritable_png(args.out)
    path = repo_root() / "data" / "materialize" / "manifest.json"
    if not path.is_file():
        raise ValueError(f"{path}: not there; run `dvc repro materialize` first")
    manifest = load_manifest(path)
    sheet, names = show_triplets(Store(storage_uri()), manifest, image_ids=args.ids, rows=args.rows, seed=args.seed)
    write_whole(args.out, images.encode_png(sheet))
    print("\n".join(map(printable, names)))
    print(f"wrote {args.out}")


def _gc(args: argparse.Namespace) -> None:
    from pbe.gc import find_unused, remove
    from pbe.places import repo_root, storage_uri
    from pbe.store import Store

    store = Store(storage_uri())
    unused = find_unused(
        store,
        repo_root(),
        older_than_s=3600 * args.older_than_h,
        run_cache=not args.no_run_cache,
        forget_missing=args.forget_missing,
    )
    for entry in unused:
        print(f"{entry.bytes / 1e6:>10.1f} MB  {entry.age_s / 3600:>7.1f} h old  {printable(entry.path)}")
    total = f"{len(unused)} folders, {sum(entry.bytes for entry in unused) / 1e6:.1f} MB in {store.uri}"
    if args.yes:
        remove(store, unused)
        print(f"removed {total}")
    else:
        print(f"{total} that no manifest of this repository refers to; `pbe gc --yes` removes them")


def _import(args: argparse.Namespace) -> None:
    from pbe.import_weights import import_weights, table_text

    print("\n".join(map(printable, table_text(import_weights(args.source, args.out, base=args.base)).split("\n"))))
    print(f"wrote {args.out}")


def _import_mixture(args: argparse.Namespace) -> None:
    from pbe.evaluate.import_mixture import import_mixture

    mixture = import_mixture(args.source, args.out)
    count, d = mixture.means.shape
    print(f"{args.out}: {count} components, {d} dimensions, {mixture.covariance_type} covariances")


def _doctor(args: argparse.Namespace) -> int:
    from pbe.doctor import examine
    from pbe.places import repo_root

    levels = []
    for finding in examine(repo_root(), gpu=args.gpu, ranks=args.ranks):
        print(printable(str(finding)), flush=True)
        levels.append(finding.level)
    print(f"{levels.count('fail')} fail, {levels.count('warn')} warn, {levels.count('ok')} ok")
    return 1 if "fail" in levels else 0


if __name__ == "__main__":
    sys.exit(main())
