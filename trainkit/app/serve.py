"""Open models and serve their page."""

from collections.abc import Sequence

from trainkit.errors import UserError

INSTALL = 'pip install "gradio>=6"'


def serve(names: Sequence[str], host: str | None, port: int | None, share: bool) -> None:
    """Load the saved pipelines `names` and serve their page until it is stopped.

    Raises:
        UserError: gradio is missing or too old, a pipeline cannot be opened, or the port is taken.
    """
    try:
        import gradio
    except ImportError:
        raise UserError(f"app.py needs the package gradio: {INSTALL}") from None
    if int(gradio.__version__.partition(".")[0]) < 6:
        raise UserError(f"app.py needs gradio 6, but {gradio.__version__} is installed: {INSTALL}")
    from trainkit.app.generation import warm_up
    from trainkit.app.models import open_model
    from trainkit.app.page import launch

    models = [open_model(name) for name in names]
    for model in models:
        warm_up(model)
    try:
        launch(models, host, port, share)
    except OSError as error:
        raise UserError(f"--port {port}: {error}") from None
