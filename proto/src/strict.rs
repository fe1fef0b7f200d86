//! Parameters are read more strictly than serde does by itself, for whoever calls means all that is said: a field that
//! this side does not know may be a protection, or a slip of the pen. Replies are not read so.

use std::borrow::Cow;
use std::cell::RefCell;
use std::fmt;

use serde::Deserialize;
use serde::de::value::CowStrDeserializer;
use serde::de::{
    DeserializeOwned, DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess,
    Visitor,
};
use serde::forward_to_deserialize_any;

/// Why a value can't be read, and where in it.
#[derive(Debug)]
pub(crate) struct Refused {
    /// What is wrong, with the innermost value that can be named: `list[2].name`. Empty if it is all of it.
    pub(crate) path: String,
    /// What serde says.
    pub(crate) error: serde_json::Error,
}

/// Reads the one value at the beginning of `text`. Fields that a struct has not are refused, unless they are null, and so
/// are lists in place of objects. What is in a tuple or in an enum's variant is not looked at.
pub(crate) fn from_str<T: DeserializeOwned>(text: &str) -> Result<T, Refused> {
    let steps = RefCell::default();
    let strict = Strict {
        inner: &mut serde_json::Deserializer::from_str(text),
        steps: &steps,
        field: false,
    };
    T::deserialize(strict).map_err(|error| Refused {
        path: path(steps.into_inner()),
        error,
    })
}

/// From a value to one that is in it.
enum Step {
    Element(usize),
    Field(String),
}

/// Nothing but a value that can't be read takes them down, from the inside out.
type Steps = RefCell<Vec<Step>>;

fn path(steps: Vec<Step>) -> String {
    let mut path = String::new();
    for step in steps.into_iter().rev() {
        match step {
            Step::Element(index) => path.push_str(&format!("[{index}]")),
            Step::Field(name) => {
                if !path.is_empty() {
                    path.push('.');
                }
                path.push_str(&name);
            }
        }
    }
    path
}

struct Strict<'s, D> {
    inner: D,
    steps: &'s Steps,
    /// It is the value of a field.
    field: bool,
}

impl<'s, D> Strict<'s, D> {
    fn within<V>(&self, inner: V) -> Within<'s, V> {
        let steps = self.steps;
        Within { inner, steps }
    }
}

impl<'de, D: Deserializer<'de>> Deserializer<'de> for Strict<'_, D> {
    type Error = D::Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
        self.inner.deserialize_any(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
        let visitor = self.within(visitor);
        self.inner.deserialize_option(visitor)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
        let visitor = self.within(visitor);
        self.inner.deserialize_seq(visitor)
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
        let visitor = self.within(visitor);
        self.inner.deserialize_map(visitor)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        // Which takes no list.
        self.deserialize_map(visitor)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        self.inner.deserialize_enum(name, variants, visitor)
    }

    /// What a struct does with the value of a field that it has not.
    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
        if !self.field {
            return self.inner.deserialize_ignored_any(visitor);
        }
        match Option::<IgnoredAny>::deserialize(self.inner)? {
            None => visitor.visit_unit(),
            Some(_) => Err(D::Error::custom("unknown field")),
        }
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct tuple
        tuple_struct identifier
    }
}

/// Hands what is within a value over as [`Strict`].
struct Within<'s, V> {
    inner: V,
    steps: &'s Steps,
}

impl<'de, V: Visitor<'de>> Visitor<'de> for Within<'_, V> {
    type Value = V::Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.expecting(f)
    }

    fn visit_none<E: Error>(self) -> Result<V::Value, E> {
        self.inner.visit_none()
    }

    fn visit_unit<E: Error>(self) -> Result<V::Value, E> {
        self.inner.visit_unit()
    }

    fn visit_some<D: Deserializer<'de>>(self, value: D) -> Result<V::Value, D::Error> {
        self.inner.visit_some(Strict {
            inner: value,
            steps: self.steps,
            field: false,
        })
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<V::Value, A::Error> {
        self.inner.visit_seq(Elements {
            inner: list,
            steps: self.steps,
            next: 0,
        })
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<V::Value, A::Error> {
        self.inner.visit_map(Fields {
            inner: map,
            steps: self.steps,
            name: Cow::Borrowed(""),
        })
    }
}

struct Elements<'s, A> {
    inner: A,
    steps: &'s Steps,
    next: usize,
}

impl<'de, A: SeqAccess<'de>> SeqAccess<'de> for Elements<'_, A> {
    type Error = A::Error;

    fn next_element_seed<S: DeserializeSeed<'de>>(
        &mut self,
        seed: S,
    ) -> Result<Option<S::Value>, A::Error> {
        let steps = self.steps;
        let field = false;
        let element = self.inner.next_element_seed(Seed { seed, steps, field });
        if element.is_err() {
            steps.borrow_mut().push(Step::Element(self.next));
        }
        self.next += 1;
        element
    }

    fn size_hint(&self) -> Option<usize> {
        self.inner.size_hint()
    }
}

struct Fields<'s, 'de, A> {
    inner: A,
    steps: &'s Steps,
    /// That of the field whose value comes next.
    name: Cow<'de, str>,
}

/// The name of a field, where it can be a piece of the text itself.
#[derive(Deserialize)]
struct Name<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'de, A: MapAccess<'de>> MapAccess<'de> for Fields<'_, 'de, A> {
    type Error = A::Error;

    fn next_key_seed<S: DeserializeSeed<'de>>(
        &mut self,
        seed: S,
    ) -> Result<Option<S::Value>, A::Error> {
        let Some(Name(name)) = self.inner.next_key()? else {
            return Ok(None);
        };
        self.name = name;
        let name = CowStrDeserializer::new(Cow::Borrowed(&*self.name));
        seed.deserialize(name).map(Some)
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, A::Error> {
        let steps = self.steps;
        let field = true;
        let value = self.inner.next_value_seed(Seed { seed, steps, field });
        if value.is_err() {
            let name = std::mem::take(&mut self.name).into_owned();
            steps.borrow_mut().push(Step::Field(name));
        }
        value
    }

    fn size_hint(&self) -> Option<usize> {
        self.inner.size_hint()
    }
}

/// Makes something of a [`Strict`].
struct Seed<'s, S> {
    seed: S,
    steps: &'s Steps,
    field: bool,
}

impl<'de, S: DeserializeSeed<'de>> DeserializeSeed<'de> for Seed<'_, S> {
    type Value = S::Value;

    fn deserialize<D: Deserializer<'de>>(self, inner: D) -> Result<S::Value, D::Error> {
        let Self { seed, steps, field } = self;
        seed.deserialize(Strict {
            inner,
            steps,
            field,
        })
    }
}
