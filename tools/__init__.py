"""Scripts of this repository; the tests import some of them."""
