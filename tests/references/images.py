"""Image files for the tests of references, and the words of a refusal."""

import base64
import io
import re

from PIL import Image

from ourvidz_serverless.errors import ReferenceFrameError

#: A part of a URL that no message may contain.
SECRET = "t0ken-s3cret"


def quarters(mode: str = "RGB") -> Image.Image:
    """An image that looks different from every side."""
    image = Image.new("RGB", (48, 32), "red")
    image.paste("lime", (24, 0, 48, 16))
    image.paste("blue", (0, 16, 24, 32))
    return image.convert(mode)


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def data_uri(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


IMAGE = encoded(quarters())


def plain_words(error: ReferenceFrameError) -> str:
    """An error's reason, once it is clear that it gives nothing away."""
    message = error.message
    assert message.startswith("reference: ")
    assert not re.search(rf"inf|nan|{SECRET}|images\.|portrait|ada|\d+\.\d+\.\d", message)
    return message.removeprefix("reference: ")
