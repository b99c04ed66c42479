"""What each Python that `insitu run` starts executes first, because this folder leads its PYTHONPATH.

It runs the `sitecustomize` that it hides, if there is one, and waits until somebody imports torch; only then is
anything of insitu imported. Any Python may run it, also one too old for insitu: it uses nothing that is new.
"""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))


def finders() -> "list[object]":
    """Return what Python asks for modules: `sys.meta_path`, which may hold what is no finder to a type checker."""
    return vars(sys)["meta_path"]  # type: ignore[no-any-return]


def say(text: str) -> None:
    """Write one line for the person at the terminal; a process without stderr is told nothing."""
    if sys.stderr is not None and not sys.stderr.closed:
        sys.stderr.write("insitu: " + text + "\n")


def is_off() -> bool:
    """Tell whether INSITU_DISABLED is set, as `insitu.setting_values.is_on` reads it."""
    return os.environ.get("INSITU_DISABLED", "").strip().lower() not in ("", "0", "false", "no", "off")


def run_hidden_one() -> None:
    """Run the `sitecustomize` that Python would have found without this folder. Raises what it raises."""
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != HERE]
    ours = sys.modules.pop("sitecustomize", None)
    try:
        import sitecustomize  # type: ignore[import-not-found]  # noqa: F401
    except ImportError as error:
        if error.name != "sitecustomize":
            raise
    finally:
        if ours is not None:
            sys.modules.setdefault("sitecustomize", ours)


def watch() -> None:
    """Look for the model from now on. torch is imported; whatever goes wrong is one line."""
    try:
        from insitu.run.model_watch import start

        start()
    except Exception as error:
        is_missing = isinstance(error, ImportError) and error.name == "insitu"
        reason = "it has no package insitu; install it there" if is_missing else repr(error)
        say("nothing is observed by " + sys.executable + ": " + reason)


class AfterTorch:
    """A finder that finds nothing itself: it lets the others find torch, and acts once torch is imported."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        if name != "torch":
            return None
        for finder in list(finders()):
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec = find(name, path, target) if find else None
            if spec is not None:
                self.follow(spec.loader)
                return spec
        return None

    def follow(self, loader: object) -> None:
        """Act after this loader has executed torch. The loader is left as it was; a failed import is tried again."""
        execute = getattr(loader, "exec_module", None)
        if execute is None:
            return

        def exec_module(module: object) -> None:
            del loader.exec_module  # type: ignore[attr-defined]
            execute(module)
            if self in finders():
                finders().remove(self)
                watch()

        loader.exec_module = exec_module  # type: ignore[attr-defined]


try:
    run_hidden_one()
finally:
    if not is_off():
        if "torch" in sys.modules:
            watch()
        else:
            finders().insert(0, AfterTorch())
