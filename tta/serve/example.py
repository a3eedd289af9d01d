"""The picture of the examples on the OpenAPI page."""

# A handwritten digit of the embedded set, 16 x 16 pixels, PNG.
DIGIT = (
    "iVBORw0KGgoAAAANSUhEUgAAABAAAAAQCAAAAAA6mKC9AAAAw0lEQVR42kXOvYrCQBiF4ZfJxEHjD3GyxSIGIlik1yJYWHiPeyt7"
    "B+4dLGsVyKIWRoNKEuIfFk7wK59z4Hzwusn3avU1b9oIAOyeg0tAAwOtse+5A3ykAR1GXSDhZqAfTd1qHefFHYmgo8MgVNUJriBA"
    "6Vk0UmYNgdUYRoELRQ1Sg5dlkP4cAAu70zsLropte5mBxaPcpf+J+NQfv38bkDzK8rjPWSgCh/pTAAryNxw4VeAIgTRhkhYtUFXd"
    "uBBneGDxBL6qN4FBhxjmAAAAAElFTkSuQmCC"
)
