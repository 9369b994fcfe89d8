//! Images of each format, made byte by byte, placed and loaded; and damaged ones.

mod damage;
mod formats;
mod images;
