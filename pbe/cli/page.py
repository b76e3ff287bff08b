"""`pbe page`: the editor in a browser."""

import argparse
import getpass
from pathlib import Path
from typing import Any

from pbe.cli.arguments import at_least
from pbe.cli.default_model import KEPT, TRAINED, default_model


def add_page_parser(commands: Any) -> None:
    page = commands.add_parser("page", help="serve a page with a brush: edit photos in a browser")
    page.add_argument(
        "--model",
        nargs="+",
        metavar="MODEL",
        help=f"folders, or org/name@revision on the hub; default: {TRAINED} if trained, otherwise {KEPT}",
    )
    page.add_argument("--host", default="127.0.0.1", help="address to listen on; other than loopback with --auth-file")
    page.add_argument(
        "--allow-host", nargs="+", default=[], metavar="NAME", help="names that a reverse proxy has for the page"
    )
    page.add_argument("--port", type=at_least(1, int), default=7860)
    page.add_argument("--auth-file", type=Path, metavar="FILE", help="users of the page; --add-user writes it")
    page.add_argument("--add-user", metavar="NAME", help="ask for a password, add the user to --auth-file, and end")
    page.add_argument("--index", type=Path, metavar="FILE", help="exemplars to choose references from; see pbe index")
    page.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    if args.add_user is not None:
        from pbe.page.users import add_user

        if args.auth_file is None:
            raise ValueError("--add-user needs --auth-file FILE, where to write the user")
        add_user(args.auth_file, args.add_user, getpass.getpass(f"password of {args.add_user}: "))
        print(f"wrote {args.auth_file}")
        return
    from pbe.page.serve import serve

    serve(
        args.model or [default_model()],
        host=args.host,
        port=args.port,
        allowed=args.allow_host,
        auth_file=args.auth_file,
        index=args.index,
    )
