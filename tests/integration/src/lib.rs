//! What the tests of the whole path share.
