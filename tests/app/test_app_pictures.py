"""The page without gradio: models that are conditioned on images, and the pictures that visitors upload."""

import base64
import io

import numpy as np
import pytest
from app_helpers import open_models, save_models
from PIL import Image
from sampling_helpers import read, sample_images

from trainkit.app import gallery
from trainkit.app.generation import BATCH_SIZE, frames, warm_up
from trainkit.app.models import describe
from trainkit.app.pictures import picture_name, read_label_map
from trainkit.app.requests import Request, Setting, make_job
from trainkit.errors import UserError

pytestmark = pytest.mark.usefixtures("on_the_cpu_alone")
KINDS = ("enlarge", "fill", "edges", "other", "maps", "plain")


def label_map():
    """Ids 0 and 3 in halves, and 1 in a corner."""
    ids = np.zeros((16, 16), np.uint8)
    ids[:, 8:], ids[:4, :4] = 3, 1
    return Image.fromarray(ids)


def palette_of(ids):
    """The same ids as entries of a palette."""
    picture = Image.frombytes("P", ids.size, ids.tobytes())
    picture.putpalette([*range(30)])
    return picture


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def models(folder):
    return open_models(folder, KINDS)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Folders of one picture each, by name: a photo is also in `masks`, as its mask."""
    folder = tmp_path_factory.mktemp("pictures")
    hidden = Image.new("L", (16, 16))
    hidden.paste(255, (2, 2, 9, 12))
    holes = Image.new("RGBA", (16, 16), "teal")
    holes.putalpha(Image.eval(hidden, lambda value: 255 - value))
    made = {
        "small": Image.linear_gradient("L").resize((8, 8)).convert("RGB"), "wide": Image.new("RGB", (12, 6), "red"),
        "photo": Image.linear_gradient("L").rotate(90).resize((16, 16)).convert("RGB"), "masks": hidden,
        "holes": holes, "lines": Image.linear_gradient("L").resize((16, 16)), "large": Image.new("RGB", (300, 200)),
        "white": Image.new("L", (16, 16), "white"), "odd": Image.new("L", (17, 17)),
        "ids": label_map(), "palette": palette_of(label_map()), "beyond": Image.new("L", (16, 16), 4),
    }  # fmt: skip
    for name, image in made.items():
        (folder / name).mkdir()
        image.save(folder / name / "a.png")
    (folder / "broken").mkdir()
    (folder / "broken" / "a.png").write_bytes(b"no picture")
    return folder


def images_of(setting, request):
    *_, last = frames(make_job(setting, request))
    return last.images


@pytest.mark.parametrize(
    "kind, given, flags",
    [
        ("enlarge", {"picture": "small", "image_noise": 0.1}, {"conditioning_dir": "small", "image_noise": 0.1}),
        ("enlarge", {"picture": "wide", "fits": False}, {"conditioning_dir": "wide"}),
        ("fill", {"picture": "photo", "mask": "masks"}, {"conditioning_dir": "photo", "mask_dir": "masks"}),
        ("fill", {"picture": "holes"}, {"conditioning_dir": "holes"}),
        ("edges", {"picture": "lines", "classes": ("dog",)}, {"conditioning_dir": "lines", "class_labels": ["dog"]}),
        ("edges", {"classes": ("dog",)}, {"class_labels": ["dog"]}),
        ("other", {"picture": "photo"}, {"conditioning_dir": "photo"}),
        ("maps", {"picture": "ids"}, {"conditioning_dir": "ids"}),
        ("maps", {"picture": "palette", "fits": False}, {"conditioning_dir": "ids"}),
    ],
)
def test_the_images_are_those_of_sample_py(models, folder, pictures, tmp_path, kind, given, flags):
    files = {name: pictures / given[name] / "a.png" for name in ("picture", "mask") if name in given}
    flags = {name: str(pictures / value) if name.endswith("_dir") else value for name, value in flags.items()}
    flags |= {"num_images": 3, "num_inference_steps": 3, "seed": 7, "sample_batch_size": BATCH_SIZE}
    sample_images(folder / kind, tmp_path / "out", scheduler="dpmsolver", guidance_scale=1.5, **flags)
    shown = images_of(Setting(models[kind], "dpmsolver", 3, 1.5), Request(7, 3, **given | files))
    assert np.array_equal(shown, read(tmp_path / "out", 3))


def test_a_picture_of_any_size_is_fitted(models, pictures):
    setting = Setting(models["enlarge"], "dpmsolver", 2)
    assert images_of(setting, Request(0, 1, picture=pictures / "large" / "a.png")).shape == (1, 16, 16, 3)
    with pytest.raises(UserError, match="Image 300×200: this model was trained with 8×8; give one of at most 4 times"):
        make_job(setting, Request(0, 1, picture=pictures / "large" / "a.png", fits=False))
    known = Setting(models["fill"], "dpmsolver", 2)
    [filled] = images_of(known, Request(0, 1, picture=pictures / "large" / "a.png", mask=pictures / "masks" / "a.png"))
    assert (filled[0] == 0).all() and (filled[5, 5] != 0).any()


def test_what_the_page_knows_of_them(models):
    about = {kind: describe(model) for kind, model in models.items()}
    assert "16×16 colour, from small images" in about["enlarge"] and "fills masks" in about["fill"]
    assert "3 classes and from edges" in about["edges"] and "from other images" in about["other"]
    assert "from label maps" in about["maps"] and picture_name(models["maps"]) == "Label map, 16×16, ids 0 to 3"
    assert picture_name(models["enlarge"]) == "Small image, 8×8" and picture_name(models["edges"]) == "Edges, 16×16"
    assert models["enlarge"].default_guidance == 1 and models["plain"].default_guidance == 2
    for model in models.values():
        warm_up(model)


def test_a_label_map_is_shown_in_colours_as_the_model_gets_it(models, pictures):
    ids = read_label_map(models["maps"], pictures / "ids" / "a.png", True)
    assert np.array_equal(ids, np.asarray(label_map()))
    html = gallery.label_map(ids, 4)
    assert "0: 44%" in html and "1: 6%" in html and "3: 50%" in html and "2:" not in html
    data = html.partition("base64,")[2].partition('"')[0]
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    colours = [tuple(shown[row, column].tolist()) for row, column in ((15, 0), (0, 0), (0, 15))]
    assert colours[0] == (0, 0, 0) and len(set(colours)) == 3
    assert f"rgb{colours[1]}" in html and (shown[:, 8:] == colours[2]).all()


@pytest.mark.parametrize(
    "kind, given, message",
    [
        ("enlarge", {}, "Image is empty: upload one (Small image, 8×8)"),
        ("enlarge", {"picture": "broken"}, "Image: it cannot be read: "),
        ("enlarge", {"picture": "gone"}, "Image: it cannot be read: "),
        ("enlarge", {"picture": "small", "image_noise": 0.5}, "Noise 0.5: enlarge was trained with noise of 0 to 0.2"),
        ("fill", {"picture": "photo"}, "Mask is empty: upload one, white where to generate, or a picture with holes"),
        ("fill", {"picture": "photo", "mask": "white"}, "Mask is white everywhere"),
        ("fill", {"picture": "photo", "mask": "broken"}, "Mask: it cannot be read: "),
        ("fill", {"picture": "photo", "mask": "small", "fits": False}, "Mask 8×8: its image is 16×16; give both one"),
        ("edges", {"picture": "odd", "fits": False}, "Image is 17x17 (HxW): the sides"),
        ("maps", {}, "Image is empty: upload one (Label map, 16×16, ids 0 to 3)"),
        ("maps", {"picture": "beyond"}, "Image: no label map that this model can use: it holds the id 4, and the ids"),
        ("maps", {"picture": "photo"}, "Image: no label map that this model can use: it has 3 channels (RGB)"),
        ("maps", {"picture": "broken"}, "Image: it cannot be read: "),
    ],
)
def test_a_bad_picture_is_one_line_that_names_the_field(models, pictures, kind, given, message):
    files = {name: pictures / given[name] / "a.png" for name in ("picture", "mask") if name in given}
    with pytest.raises(UserError) as error:
        make_job(Setting(models[kind], "dpmsolver", 2), Request(0, 1, **given | files))
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
