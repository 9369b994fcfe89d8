//! Tests of the whole path.
