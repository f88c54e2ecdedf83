"""Makes a picture of twelve clips with the box, the sentence and the actions of every person.

    python -m data_pipelines.mini_refava.contact_sheet --output contact_sheet.png

The suffix of the file says its format. `--strip FILE` also writes the stored frames of the first four clips, in rows.
"""

import argparse

from PIL import Image, ImageDraw, ImageFont

from data_pipelines.mini_refava import people, scenes
from data_pipelines.mini_refava.layout import HEIGHT, WIDTH
from data_pipelines.mini_refava.shapes import Colour

COLUMNS, ROWS, ENLARGED, GAP = 3, 4, 2, 14
LINE = 15
CAPTION = 8 * LINE + 12
BOX_COLOURS: tuple[Colour, ...] = ((214, 32, 84), (0, 112, 202), (0, 128, 74), (192, 92, 0))
PAPER, INK = (255, 255, 255), (96, 98, 104)


def _boxed(scene: scenes.Scene) -> Image.Image:
    """Returns the key frame, enlarged, with a coloured box around each person."""
    frame = Image.fromarray(scenes.render(scene, scenes.KEY_POSITION))
    size = (WIDTH * ENLARGED, HEIGHT * ENLARGED)
    image = frame.resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(12)
    for number, person in enumerate(scene.people):
        x1, y1, x2, y2 = (v * s for v, s in zip(person.box, size * 2, strict=True))
        colour = BOX_COLOURS[number]
        draw.rectangle((x1 - 1, y1 - 1, x2, y2), outline=colour, width=2)
        draw.rectangle((x1 - 1, y1 - 1, x1 + 12, y1 + 13), fill=colour)
        draw.text((x1 + 6, y1 + 6), str(number + 1), fill=PAPER, font=font, anchor="mm")
    return image


def _fitting(text: str) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The largest of a few font sizes at which the text is no wider than a picture."""
    for size in (12, 11, 10, 9):
        font = ImageFont.load_default(size)
        if font.getlength(text) <= WIDTH * ENLARGED:
            break
    return font


def _caption(draw: ImageDraw.ImageDraw, scene: scenes.Scene, x: int, y: int) -> None:
    font = ImageFont.load_default(12)
    for number, person in enumerate(scene.people):
        colour = BOX_COLOURS[number]
        sentence = f"{number + 1}  {person.sentence}"
        actions = " + ".join(people.ACTION_NAMES[label] for label in person.actions.labels)
        draw.text((x, y), sentence, fill=colour, font=_fitting(sentence))
        draw.text((x + 14, y + LINE - 1), actions, fill=INK, font=font)
        y += 2 * LINE


def contact_sheet(seed: int, split: str, start: int = 0) -> Image.Image:
    """Returns a picture of the twelve clips of a split from number `start` on."""
    width, height = WIDTH * ENLARGED, HEIGHT * ENLARGED + CAPTION
    sheet = Image.new("RGB", (COLUMNS * (width + GAP) + GAP, ROWS * (height + GAP) + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    for k in range(COLUMNS * ROWS):
        scene = scenes.make_scene(seed, split, start + k)
        x = GAP + (k % COLUMNS) * (width + GAP)
        y = GAP + (k // COLUMNS) * (height + GAP)
        sheet.paste(_boxed(scene), (x, y))
        _caption(draw, scene, x, y + HEIGHT * ENLARGED + 5)
    return sheet


def strip(
    seed: int, split: str, start: int = 0, num_clips: int = 4, stored_frames: int = 9
) -> Image.Image:
    """Returns the stored frames of some clips, one clip a row."""
    positions = scenes.stored_positions(stored_frames)
    image = Image.new("RGB", (len(positions) * (WIDTH + 4), num_clips * (HEIGHT + 4)), PAPER)
    for row in range(num_clips):
        scene = scenes.make_scene(seed, split, start + row)
        for column, position in enumerate(positions):
            frame = Image.fromarray(scenes.render(scene, position))
            image.paste(frame, (column * (WIDTH + 4), row * (HEIGHT + 4)))
    return image


def main() -> None:
    """Parses the flags and writes the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", required=True, help="file to write; .png or .jpg")
    parser.add_argument("--strip", default="", help="file for the stored frames of four clips")
    parser.add_argument("--seed", type=int, default=0, help="seed of the scenes")
    parser.add_argument(
        "--split", choices=scenes.SPLITS, default="test", help="split of the scenes"
    )
    parser.add_argument("--start", type=int, default=0, help="number of the first clip")
    flags = parser.parse_args()
    contact_sheet(flags.seed, flags.split, flags.start).save(flags.output, optimize=True)
    if flags.strip:
        strip(flags.seed, flags.split, flags.start).save(flags.strip, optimize=True)


if __name__ == "__main__":
    main()
