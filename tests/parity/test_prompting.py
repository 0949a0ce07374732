"""Text and image files: what the checkpoint's own tokenizer and image processor make of them is what is run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessorPil

import torch_models
from loaders import open_checkpoint
from parity import cli
from parity.prompting import read_prompt
from parity.zoo import make_checkpoint

TEMPLATE = (
    "{% for message in messages %}ask {% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}<start> <image> <end> {% else %}{{ part.text }}"
    "{% endif %}{% endfor %}{% endif %}{% endfor %} answer"
)


def with_processor(directory: Path, *, template: str | None = TEMPLATE) -> Path:
    """A checkpoint with a tokenizer whose words are numbers, and its image processor."""
    config = open_checkpoint(directory).config
    words = {"ask": 50, "answer": 51, "what": 52, "<unk>": 0}
    if config.vision is not None:
        words |= {"<image>": config.vision.image_token_id, "<start>": 205, "<end>": 206}
    words |= {f"w{token}": token for token in range(config.vocab_size) if token not in words.values()}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    fast.chat_template = template
    fast.save_pretrained(directory)
    sizes = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
    Qwen2VLImageProcessorPil(**sizes, size={"shortest_edge": 64, "longest_edge": 2048}).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return with_processor(make_checkpoint("qwen3_vl", tmp_path_factory.mktemp("seeing") / "checkpoint"))


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "cat.png"
    rng = np.random.default_rng(3)
    Image.fromarray(rng.integers(0, 255, (24, 40, 3), dtype=np.uint8)).save(path)
    return path


def test_an_image_stands_where_the_template_puts_it_with_as_many_tokens_as_it_has(checkpoint, picture):
    config = open_checkpoint(checkpoint).config
    prompt = read_prompt(checkpoint, config, "what", [picture])
    grid = prompt.inputs["image_grid_thw"][0]
    count = int(grid.prod()) // 4
    image = config.vision.image_token_id
    assert prompt.inputs["input_ids"].tolist() == [[50, 205, *[image] * count, 206, 52, 51]]
    assert prompt.inputs["mm_token_type_ids"].tolist() == [[0, 0, *[1] * count, 0, 0, 0]]
    assert prompt.inputs["pixel_values"].shape == (grid.prod(), config.vision.patch_numbers)
    assert prompt.decode([52, 51]) == "what answer"


def test_the_command_says_what_the_model_says(checkpoint, picture, capsys):
    config = open_checkpoint(checkpoint).config
    prompt = read_prompt(checkpoint, config, "what", [picture, picture])
    expected = torch_models.load(checkpoint).generate(**prompt.inputs, max_new_tokens=3, ignore_eos=True)
    images = ["--image", str(picture), "--image", str(picture)]
    options = ["--backend", "torch", "--max-new-tokens", "3", "--ignore-eos"]
    assert cli.main(["generate", str(checkpoint), "--prompt", "what", *images, *options]) == 0
    assert capsys.readouterr().out.strip() == prompt.decode(expected[0].tolist())


def test_text_alone_needs_no_image_processor(tmp_path):
    plain = with_processor(make_checkpoint("qwen3", tmp_path / "a"), template=None)
    (plain / "preprocessor_config.json").unlink()
    prompt = read_prompt(plain, open_checkpoint(plain).config, "what w7")
    assert prompt.inputs["input_ids"].tolist() == [[52, 7]]
    assert prompt.inputs.keys() == {"input_ids"}


@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_a_prompt_is_read_at_an_address_as_in_a_directory(tmp_path, template):
    plain = with_processor(make_checkpoint("qwen3", tmp_path / "a"), template=None)
    if template:  # where processors used to keep it
        (plain / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    config = open_checkpoint(plain).config
    there, here = (read_prompt(one, config, "what w7") for one in (f"direct://{plain}", plain))
    assert there.inputs["input_ids"].tolist() == here.inputs["input_ids"].tolist()
    assert there.is_templated == here.is_templated == (template is not None)
    (plain / "chat_template.json").write_text("[]")
    with pytest.raises(ValueError, match=f"direct://{plain}/chat_template.json is no JSON object"):
        read_prompt(f"direct://{plain}", config, "what w7")


def test_images_for_a_model_that_sees_nothing_are_refused(tmp_path, picture):
    plain = with_processor(make_checkpoint("qwen3", tmp_path / "a"))
    with pytest.raises(ValueError, match="sees nothing"):
        read_prompt(plain, open_checkpoint(plain).config, "what", [picture])


def test_a_tokenizer_that_does_not_know_the_placeholder_is_refused(checkpoint, picture, tmp_path):
    other = with_processor(make_checkpoint("qwen3_vl", tmp_path / "a"))
    document = json.loads((other / "tokenizer.json").read_text())
    del document["model"]["vocab"]["<image>"]
    (other / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match="does not know image_token_id=203"):
        read_prompt(other, open_checkpoint(other).config, "what", [picture])


def test_a_file_that_is_no_image_is_an_error(checkpoint, tmp_path):
    (tmp_path / "cat.png").write_text("no image")
    with pytest.raises(OSError, match="cannot identify image"):
        read_prompt(checkpoint, open_checkpoint(checkpoint).config, "what", [tmp_path / "cat.png"])


def test_an_image_is_turned_as_the_camera_was_held(checkpoint, picture, tmp_path):
    config, exif = open_checkpoint(checkpoint).config, Image.Exif()
    exif[0x0112] = 6  # orientation: a quarter turn
    image = Image.open(picture)
    image.save(tmp_path / "held.png", exif=exif)
    image.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "turned.png")
    held, turned = (read_prompt(checkpoint, config, "what", [tmp_path / name]) for name in ("held.png", "turned.png"))
    assert held.inputs["image_grid_thw"].tolist() == [[1, 10, 6]]
    for name, value in turned.inputs.items():
        np.testing.assert_array_equal(held.inputs[name], value)


def test_a_prompt_that_holds_placeholders_of_its_own_is_refused_with_both_numbers(checkpoint, picture, capsys):
    command = ["generate", str(checkpoint), "--prompt", "what <image> <image>", "--image", str(picture)]
    assert cli.main(command) == 2
    assert "holds 3 image placeholders '<image>', expected 1, one of each image" in capsys.readouterr().err


def test_a_template_that_leaves_images_out_is_refused(picture, tmp_path):
    other = with_processor(make_checkpoint("qwen3_vl", tmp_path / "a"), template="ask {{ messages[0].role }}")
    with pytest.raises(ValueError, match="holds 0 image placeholders '<image>', expected 1.*template leaves"):
        read_prompt(other, open_checkpoint(other).config, "what", [picture])


def test_a_template_in_the_file_of_processors_is_used_where_the_tokenizer_has_none(checkpoint, picture, tmp_path):
    config = open_checkpoint(checkpoint).config
    other = with_processor(make_checkpoint("qwen3_vl", tmp_path / "a"), template=None)
    file = other / "chat_template.json"
    file.write_text(json.dumps({"chat_template": TEMPLATE}))
    expected, found = (read_prompt(path, config, "what", [picture]) for path in (checkpoint, other))
    assert found.inputs["input_ids"].tolist() == expected.inputs["input_ids"].tolist()
    (other / "chat_template.jinja").write_text("what")  # the newer file wins
    assert read_prompt(other, config, "what").inputs["input_ids"].tolist() == [[52]]
    (other / "chat_template.jinja").unlink()
    for wrong in ("{", "[]", "{}", '{"chat_template": 1}'):
        file.write_text(wrong)
        with pytest.raises(ValueError, match=r"chat_template\.json"):
            read_prompt(other, config, "what")


def test_the_command_says_where_there_is_no_template(checkpoint, tmp_path, capsys):
    plain = with_processor(make_checkpoint("qwen3", tmp_path / "a"), template=None)
    options = ["--prompt", "what", "--backend", "torch", "--max-new-tokens", "1"]
    assert cli.main(["generate", str(plain), *options]) == 0
    assert "has no chat template: the prompt is taken as it stands" in capsys.readouterr().err
    assert cli.main(["generate", str(checkpoint), *options]) == 0
    assert "template" not in capsys.readouterr().err


def test_the_options_that_do_not_go_together_are_refused(checkpoint, picture, capsys):
    assert cli.main(["generate", str(checkpoint), "--prompt-ids", "1", "--image", str(picture)]) == 2
    assert "--image goes with --prompt" in capsys.readouterr().err


def test_a_prompt_without_a_token_is_refused(checkpoint):
    config = open_checkpoint(checkpoint).config
    plain = with_processor(make_checkpoint("qwen3", checkpoint.parent / "plain", num_hidden_layers=1), template=None)
    with pytest.raises(ValueError, match="the prompt has no token|the prompt is no token at all"):
        read_prompt(plain, config, "")
