"""Learned models: each library's own loading and transforms, on tiny networks of random weights."""

from __future__ import annotations

import hashlib
import json
import pickle

import huggingface_hub.constants
import numpy as np
import onnx
import pytest
import torch
import torchvision_ops
from odd_files import photo
from PIL import Image

import snipdedup
from snipdedup.errors import SnipError, UsageError
from snipdedup.pictures import preprocess
from snipdedup.pictures.learned import SSCD
from snipdedup.pictures.models import open_model
from snipdedup.pictures.preprocess import Preprocess, parse_preprocess

torchvision_ops.define_missing()
import open_clip  # noqa: E402
import timm  # noqa: E402

SIZES = ((90, 60), (60, 90), (33, 200), (20, 20), (64, 64), (101, 57))  # width, height
PICTURES = [photo(number, size) for number, size in enumerate(SIZES)]
TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 48, "layers": 2, "width": 32, "patch_size": 16, "head_width": 16},
    "text_cfg": {
        "context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2,
    },
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Let networks that are this small run on one thread: many only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rows_of(model, pictures=PICTURES):
    return model.encode(np.stack([model.prepare(picture) for picture in pictures]))


def unit(rows):
    rows = rows.detach().numpy().astype(np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def assert_same(model, expected):
    """Rows equal the library's own, however they are batched, and are of norm 1."""
    rows = rows_of(model)
    assert rows.dtype == np.float32
    assert rows.shape == (len(PICTURES), model.dim)
    np.testing.assert_allclose(rows, unit(expected), atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(rows_of(model, PICTURES[2:3]), rows[2:3], atol=1e-5)
    assert np.ptp(rows, axis=0).max() > 0.01  # the pictures differ
    pickle.loads(pickle.dumps(model.prepare))(PICTURES[0])


class Net(torch.nn.Module):
    """Pictures of any size to 12 values."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv = torch.nn.Conv2d(3, 12, 5, stride=3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.conv(x)).mean((2, 3))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    (folder / "tiny-snip.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder / "tiny-snip.json")
    torch.manual_seed(0)
    network = open_clip.create_model("tiny-snip")
    torch.save(network.state_dict(), folder / "tiny.pt")
    return network.eval(), folder / "tiny.pt"


def test_clip_is_as_open_clip_does_it(clip):
    network, weights = clip
    model = open_model(f"clip:tiny-snip/{weights}")
    transform = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(**network.visual.preprocess_cfg), is_train=False
    )
    with torch.inference_mode():
        expected = network.encode_image(torch.stack([transform(each) for each in PICTURES]))
        texts = network.encode_text(open_clip.get_tokenizer("tiny-snip")(["a cat", "two dogs"]))
    assert_same(model, expected)
    np.testing.assert_allclose(model.encode_texts(["a cat", "two dogs"]), unit(texts), atol=1e-3)
    assert (model.dim, model.threshold) == (24, 0.95)
    assert model.described["kind"] == "clip"
    assert model.described["preprocess"]["size"] == [48, 48]


def test_a_tokenizer_is_opened_for_captions_only_and_not_fetched(clip, tmp_path, monkeypatch):
    """open_clip's models of Hugging Face open theirs by the hub, through transformers."""
    spec, offline = f"clip:tiny-snip/{clip[1]}", []

    def get_tokenizer(name):
        offline.append(huggingface_hub.constants.is_offline_mode())
        raise ImportError("No module named 'transformers'\nand more")

    monkeypatch.setattr(open_clip, "get_tokenizer", get_tokenizer)
    PICTURES[0].save(tmp_path / "a.png")
    snipdedup.embed(tmp_path / "a.png", out=tmp_path / "out", model=spec, threads=1)
    assert not offline
    assert not (tmp_path / "out" / "text_emb").exists()
    says = "its tokenizer fails: No module named 'transformers'"
    with pytest.raises(SnipError, match=rf"{says}; .*give --download$") as caught:
        open_model(spec).encode_texts(["a cat"])
    assert "\n" not in str(caught.value)
    with pytest.raises(SnipError, match=rf"{says}$"):
        open_model(spec, download=True).encode_texts(["a cat"])
    assert offline == [True, False]
    assert not huggingface_hub.constants.is_offline_mode()


@pytest.mark.parametrize("name", ["hf-hub:timm/test_resnet.r160_in1k", "hf_hub:timm/x"])
def test_what_lies_on_the_hub_needs_download(monkeypatch, name):
    made = []

    def create_model(*words, **more):
        made.append((words[0], huggingface_hub.constants.is_offline_mode()))
        raise OSError("no connection")

    monkeypatch.setattr(timm, "create_model", create_model)
    with pytest.raises(SnipError, match=r"hub: needs --download$"):
        open_model(f"timm:{name}")
    assert not made
    with pytest.raises(SnipError, match=r"timm cannot make it: no connection$"):
        open_model(f"timm:{name}", download=True)
    assert made == [(name, False)]


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_timm_is_as_timm_does_it(tmp_path, monkeypatch, mode):
    torch.manual_seed(1)
    network = timm.create_model("test_resnet", pretrained=False).eval()
    torch.save(network.state_dict(), tmp_path / "own.pth")
    config = {**network.pretrained_cfg, "crop_mode": mode, "crop_pct": 0.8, "mean": (0.4, 0.5, 0.6),
              "input_size": (3, 64, 64)}  # fmt: skip
    monkeypatch.setattr(timm.data.config, "DEFAULT_CROP_MODE", mode)
    real = timm.data.config.resolve_data_config
    monkeypatch.setattr(
        timm.data.config, "resolve_data_config",
        lambda args, model: real(args, pretrained_cfg=config),
    )  # fmt: skip
    model = open_model(f"timm:test_resnet/{tmp_path / 'own.pth'}")
    transform = timm.data.create_transform(**real({}, pretrained_cfg=config))
    with torch.inference_mode():
        features = network.forward_features(torch.stack([transform(each) for each in PICTURES]))
        expected = network.forward_head(features, pre_logits=True)
    assert_same(model, expected)
    assert model.encode_texts(["a cat"]) is None
    assert "none is known" in model.described["threshold_from"]


def test_timm_weights_that_are_cached_or_not(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    with pytest.raises(SnipError, match=r"timm:test_resnet: its weights are not on this machine"):
        open_model("timm:test_resnet")
    torch.manual_seed(2)
    network = timm.create_model("test_resnet", pretrained=False).eval()
    path = tmp_path / "model.safetensors"
    torch.save(network.state_dict(), path.with_suffix(".pth"))
    fetched = []
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download",
        lambda *words: fetched.append(words) or str(path.with_suffix(".pth")),
    )
    model = open_model("timm:test_resnet", download=True)
    assert fetched == [("timm/test_resnet.r160_in1k", "model.safetensors")]
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=network))
    with torch.inference_mode():
        inputs = torch.stack([transform(each) for each in PICTURES])
        expected = network.forward_head(network.forward_features(inputs), pre_logits=True)
    assert_same(model, expected)


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "other.pth")
    with pytest.raises(
        SnipError, match=r"other\.pth does not fit: it lacks .* missing and \d+ too"
    ):
        open_model(f"timm:test_resnet/{tmp_path / 'other.pth'}")


def of_torchvision(size, scaled, mean, std, bgr=False):
    from torchvision import transforms

    way = transforms.InterpolationMode.BILINEAR
    steps = transforms.Compose([
        transforms.Resize(scaled, way), transforms.CenterCrop(size), transforms.ToTensor(),
    ])  # fmt: skip
    values = torch.stack([steps(each) for each in PICTURES])
    values = values.flip(1) if bgr else values
    return (values - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_onnx_is_as_onnxruntime_does_it(tmp_path, layout):
    net, path = Net().eval(), tmp_path / "net.onnx"
    weight, bias = (each.detach().numpy() for each in (net.conv.weight, net.conv.bias))
    taken = [None, 3, 40, 40] if layout == "nchw" else [None, 40, 40, 3]
    nodes = [
        onnx.helper.make_node("Transpose", ["image"], ["turned"], perm=[0, 3, 1, 2]),
        onnx.helper.make_node("Conv", ["turned", "w", "b"], ["conv"], strides=[3, 3]),
        onnx.helper.make_node("Tanh", ["conv"], ["bent"]),
        onnx.helper.make_node("GlobalAveragePool", ["bent"], ["pooled"]),
        onnx.helper.make_node("Flatten", ["pooled"], ["vector"]),
    ]
    if layout == "nchw":
        nodes[1].input[0] = "image"
        del nodes[0]
    floats = onnx.TensorProto.FLOAT
    outputs = [("bent", [None, 12, None, None]), ("vector", [None, 12])]
    graph = onnx.helper.make_graph(
        nodes, "net", [onnx.helper.make_tensor_value_info("image", floats, taken)],
        [onnx.helper.make_tensor_value_info(name, floats, shape) for name, shape in outputs],
        [onnx.numpy_helper.from_array(weight, "w"), onnx.numpy_helper.from_array(bias, "b")],
    )  # fmt: skip
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=9), path)
    mean, std = (0.3, 0.4, 0.5), (0.2, 0.25, 0.3)
    words = (
        f"size=40 scaled=44 mean=0.3,0.4,0.5 std=0.2,0.25,0.3 interpolation=bilinear channels=bgr "
        f"layout={layout}"
    )
    with torch.inference_mode():
        expected = net(of_torchvision(40, 44, mean, std, bgr=True))
    assert_same(open_model(f"onnx:{path}", preprocess=f"{words} output=vector"), expected)
    with pytest.raises(SnipError, match=r"expected a vector a picture.*found \(1, 12, 12, 12\)"):
        open_model(f"onnx:{path}", preprocess=words)
    with pytest.raises(SnipError, match="it has no output deep; it has bent, vector"):
        open_model(f"onnx:{path}", preprocess=f"{words} output=deep")
    with pytest.raises(
        SnipError, match=r"is not known; give --preprocess, or write net\.onnx\.json"
    ):
        open_model(f"onnx:{path}")
    processor = {
        "do_resize": True, "size": {"shortest_edge": 44}, "do_center_crop": True,
        "crop_size": {"height": 40, "width": 40}, "image_mean": mean, "image_std": std,
        "do_rescale": True, "rescale_factor": 1 / 255, "resample": 2,
    }  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    model = open_model(f"onnx:{path}", preprocess=f"output=vector channels=bgr layout={layout}")
    assert_same(model, expected)


def test_torchscript_is_as_torch_does_it(tmp_path):
    net = Net().eval()
    path = tmp_path / "net.pt"
    torch.jit.trace(net, torch.zeros(1, 3, 50, 50)).save(path)
    settings = {"size": 50, "scaled": 60, "interpolation": "bilinear", "mean": 0.5, "std": 0.25}
    (tmp_path / "net.pt.json").write_text(json.dumps(settings))
    with torch.inference_mode():
        expected = net(of_torchvision(50, 60, (0.5,) * 3, (0.25,) * 3))
    model = open_model(f"torchscript:{path}")
    assert_same(model, expected)
    again = [rows_of(model) for _ in range(4)]  # TorchScript optimises after some calls
    assert all((each == again[0]).all() for each in again)
    assert len(model.described["weights_sha256"]) == 64
    assert model.size == 120  # twice what it is scaled to: a smaller draft would be blurred


def test_embed_takes_the_model_and_its_preprocessing(tmp_path):
    net, path, photos = Net().eval(), tmp_path / "net.pt", tmp_path / "photos"
    torch.jit.trace(net, torch.zeros(1, 3, 50, 50)).save(path)
    photos.mkdir()
    for number, picture in enumerate(PICTURES):
        picture.save(photos / f"{number}.png")
    words, out = "size=50 resize=squash mean=0.5 std=0.25", tmp_path / "out"
    snipdedup.embed(str(photos), out=str(out), model=f"torchscript:{path}", preprocess=words)
    model = open_model(f"torchscript:{path}", preprocess=words)
    rows = np.load(out / "img_emb" / "img_emb_0000.npy")
    np.testing.assert_allclose(rows, rows_of(model), atol=1e-3)
    said = json.loads((out / "snip.json").read_text())["model"]
    assert said["weights_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert said["preprocess"] == model.preprocess.described()
    again = snipdedup.embed(
        str(photos), out=str(out), model=f"torchscript:{path}", preprocess=words
    )
    assert "finished already" in str(again)
    with pytest.raises(SnipError, match=r"--overwrite"):
        snipdedup.embed(
            str(photos), out=str(out), model=f"torchscript:{path}", preprocess="size=50"
        )


def test_sscd_is_prepared_as_its_authors_say(tmp_path):
    net, path = Net().eval(), tmp_path / "sscd_disc_mixup.torchscript.pt"
    torch.jit.trace(net, torch.zeros(1, 3, 320, 320)).save(path)
    with torch.inference_mode():
        expected = net(of_torchvision((320, 320), (320, 320), SSCD.mean, SSCD.std))
    model = open_model(f"torchscript:{path}")
    assert_same(model, expected)
    assert model.threshold == 0.75


@pytest.mark.parametrize(
    ("spec", "kind", "says"),
    [
        ("resnet50", UsageError, "--model must be one of phash, pdq, clip:NAME, timm:NAME"),
        ("clip:", UsageError, "must be one of"),
        ("clip:ViT-B-32", UsageError, "expected clip:ARCHITECTURE/WEIGHTS"),
        ("clip:ViT-B-32/none", SnipError, "neither a file nor weights that open_clip has"),
        ("timm:no_such_net", SnipError, "timm cannot make it"),
        ("timm:test_resnet/gone.pth", SnipError, "no such file: gone.pth"),
        ("onnx:gone.onnx", SnipError, "no such file: gone.onnx"),
        ("onnx:{bad}", SnipError, "onnxruntime cannot load it"),
        ("torchscript:{bad}", SnipError, "torch cannot load it"),
    ],
)
def test_models_that_are_refused(tmp_path, spec, kind, says):
    (tmp_path / "bad").write_bytes(b"no model")
    (tmp_path / "bad.json").write_text('{"size": 32}')
    with pytest.raises(kind, match=says) as caught:
        open_model(spec.format(bad=tmp_path / "bad"))
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("extra", ["clip", "timm", "onnx"])
def test_a_missing_extra_is_named(monkeypatch, extra):
    library = {"clip": "open_clip", "onnx": "onnxruntime"}.get(extra, extra)
    monkeypatch.setitem(__import__("sys").modules, library, None)
    with pytest.raises(SnipError, match=rf"pip install 'snipdedup-toolkit\[{extra}\]'"):
        open_model(f"{extra}:a/b")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("size", "no such file|expected JSON"),
        ("size=", "expected NAME=VALUE"),
        ("mean=.5", "needs a size"),
        ("size=0", "size: expected one or 2 numbers from 1 on, 8,192 at most, found '0'"),
        ("size=3,4,5", "size: expected one or 2 numbers"),
        ("size=100000000", "size: expected one or 2 numbers from 1 on, 8,192 at most"),
        ("size=8 fill=256", "fill: expected one or 3 numbers from 0 on, 255 at most"),
        ("size=8 scale=inf", "scale: expected one or 1 numbers, found 'inf'"),
        ("size=8 std=0", "std: expected one or 3 numbers from 1e-06 on"),
        ("size=8 mean=red", "mean: expected one or 3 numbers"),
        ("size=8 resize=half", "resize: expected one of shortest, squash, longest, found 'half'"),
        ("size=8 colour=red", "preprocessing has no 'colour'; it has size, scaled"),
    ],
)
def test_preprocessing_that_is_refused(words, says):
    with pytest.raises(SnipError, match=says):
        parse_preprocess(words)


@pytest.mark.parametrize(
    ("odd", "says"),
    [
        ({"size": {"longest_edge": 9}}, "size: expected height and width, or shortest_edge, found"),
        ({"size": {"height": 9}}, "size: expected height and width, or shortest_edge, found"),
        ({"size": None}, "the preprocessing needs a size"),
        ({"size": [1, 2, 3]}, "size: expected one or 2 numbers"),
        ({"size": 1e999}, "size: expected one or 2 numbers"),
        ({"crop_size": {"width": 9}}, "crop_size: expected height and width, or shortest_edge"),
        ({"crop_size": "x"}, "crop_size: expected one or 2 numbers"),
        ({"image_mean": {"r": 1}}, "image_mean: expected one or 3 numbers"),
        ({"image_std": [1, 0, 1]}, "image_std: expected one or 3 numbers"),
        ({"rescale_factor": [1, 2]}, "rescale_factor: expected one or 1 numbers"),
        ({"resample": []}, "resample: expected one of nearest, lanczos"),
        ({"resample": 6}, "resample: expected one of nearest, lanczos"),
        ({"resample": "PIL.Image.BICUBIC"}, "resample: expected one of nearest, lanczos"),
    ],
)
def test_processors_of_hugging_face_that_are_refused(tmp_path, odd, says):
    body = {"do_resize": True, "size": 9, "do_center_crop": "crop_size" in odd, **odd}
    (tmp_path / "processor.json").write_text(json.dumps(body))
    with pytest.raises(SnipError, match=rf"processor\.json: {says}") as caught:
        parse_preprocess(str(tmp_path / "processor.json"))
    assert len(str(caught.value)) < 500
    (tmp_path / "processor.json").write_text("[" * 100_000)
    with pytest.raises(SnipError, match="expected JSON with the preprocessing"):
        parse_preprocess(str(tmp_path / "processor.json"))


@pytest.mark.parametrize("settings", [{}, {"scaled": (50, 50)}, {"size": (60, 30)}])
@pytest.mark.parametrize("way", preprocess.INTERPOLATIONS)
def test_part_of_a_resized_picture_is_cut_out_of_the_whole(monkeypatch, way, settings):
    how = Preprocess(**{"size": (40, 40), "interpolation": way} | settings)
    sizes = [*SIZES, (7, 300), (300, 7), (700, 90)]
    pictures = [photo(number, size) for number, size in enumerate(sizes)]
    whole = [how.apply(picture).astype(int) for picture in pictures]
    monkeypatch.setattr(preprocess, "WHOLE_PIXELS", 0)
    for picture, expected in zip(pictures, whole, strict=True):
        apart = np.abs(how.apply(picture) - expected)
        if way in ("nearest", "box"):  # an edge between two pixels may fall on the other side
            assert (apart > 0).mean() < 0.15
        else:
            assert apart.max() <= 2


@pytest.mark.parametrize("size", [(4, 20_000), (20_000, 4), (1, 3_000_000)])
def test_a_thin_picture_is_not_blown_up(monkeypatch, size):
    made, real = [], Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize",
        lambda self, size, *more, **named: made.append(size) or real(self, size, *more, **named),
    )  # fmt: skip
    pixels = np.zeros((*size[::-1], 3), np.uint8)
    middle = [slice(side // 2 - 2, side // 2 + 2) if side > 4 else slice(None) for side in size]
    pixels[middle[1], middle[0]] = (250, 120, 60)
    found = Preprocess((224, 224), interpolation="bilinear").apply(Image.fromarray(pixels))
    assert made == [(224, 224)]
    assert found.shape == (224, 224, 3)
    assert found[112, 112].tolist() == [250, 120, 60]


def test_processors_of_hugging_face_by_our_names(tmp_path):
    path = tmp_path / "processor.json"
    body = {"do_resize": True, "size": {"height": 30, "width": 20}, "resample": 0,
            "do_rescale": False, "do_normalize": False}  # fmt: skip
    path.write_text(json.dumps(body))
    found = parse_preprocess(str(path))
    assert found == Preprocess(
        (30, 20), (0, 0, 0), (1, 1, 1), "squash", (30, 20), "nearest", scale=1
    )
    values = found.floats(found.apply(Image.new("RGB", (7, 5), (10, 20, 30)))[None])
    assert values.shape == (1, 3, 30, 20)
    assert (values[0, :, 4, 5] == (10, 20, 30)).all()
    assert [preprocess.middle(*two) for two in ((9, 4), (7, 4), (4, 9))] == [2, 2, -2]


def test_sizes_that_are_worked_by_hand():
    longest, oblong = Preprocess((40, 40), resize="longest"), Preprocess((60, 30))
    assert longest.resized((90, 62), (40, 40)) == (40, 28)  # 27.6
    assert oblong.resized((105, 57), (60, 30)) == (111, 60)  # 110.5
