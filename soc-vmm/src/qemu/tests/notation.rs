//! Notations of properties.

use proptest::prelude::*;
use serde::Deserialize;
use serde_json::json;

use crate::qemu::{Device, PciAddress, Properties, Size, Switch, Uuid};

#[derive(Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Everything {
    word: String,
    number: Option<u32>,
    below: Option<i8>,
    on: Option<bool>,
    size: Option<Size>,
    switch: Option<Switch>,
    inner: Option<Inner>,
    list: Option<Vec<u8>>,
    kind: Option<Kind>,
}

#[derive(Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Inner {
    a: u64,
    b: Option<String>,
}

#[derive(Debug, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Kind {
    OneThing,
    Another,
}

fn read(text: &str) -> Result<Everything, String> {
    Properties::parse(text, Some("word")).and_then(|properties| properties.read()).map_err(|wrong| wrong.to_string())
}

#[test]
fn text_and_json_say_the_same() {
    let text =
        "a,,b,number=0x10,below=-3,on=yes,size=2K,switch=auto,inner.a=7,inner.b=x=y,list.0=1,list.1=2,kind=one-thing";
    let json = json!({
        "word": "a,b", "number": 16, "below": -3, "on": true, "size": "2K", "switch": "auto",
        "inner": {"a": 7, "b": "x=y"}, "list": [1, 2], "kind": "one-thing",
    });
    let read_text = read(text).unwrap();
    assert_eq!(read_text, read(&json.to_string()).unwrap());
    assert_eq!((read_text.size, read_text.kind), (Some(Size::Bytes(2048)), Some(Kind::OneThing)));
    assert_eq!(read("w,on").unwrap().on, Some(true), "a bare word is a switch that is on");
    assert_eq!(read("word=w,on=off").unwrap().on, Some(false));
}

#[test]
fn what_is_wrong_is_told_by_its_key() {
    for (text, said) in [
        ("w,word=v", "'word' is there twice"),
        ("w,number=x", "number: 'x' is no number"),
        ("w,number=4294967296", "number: invalid value"),
        ("w,number=+1", "number: '+1' is no number"),
        ("w,below=200", "below: invalid value"),
        ("w,on=maybe", "on: 'maybe': write on or off"),
        ("w,size=1Q", "size: '1Q' is no size"),
        ("w,size=16E", "size: '16E' is no size"),
        ("w,inner.a=1,inner.c=2", "inner: there is no 'c' here; there is a, b"),
        ("w,inner.a=x", "inner: a: 'x' is no number"),
        ("w,inner=1", "inner: invalid type"),
        ("w,inner=1,inner.a=1", "'inner' is a value and has parts"),
        ("w,list.1=1", "list: a list's keys count from 0"),
        ("w,kind=other", "kind: 'other' is none of one-thing, another"),
        ("w,frob=1", "there is no 'frob' here; there is word, number,"),
        ("number=1", "it needs 'word'"),
        ("w,=1", "'' is no key"),
        ("w,a..b=1", "'a..b' is no key"),
        ("w,", "'' is no key"),
        ("{\"word\":\"w\",\"on\":\"on\"}", "on: invalid type: string \"on\", expected a boolean"),
        ("{\"word\":1}", "word: invalid type"),
        ("{\"word\":\"w\"", "no sound JSON"),
        ("{\"word\":\"w\",\"word\":\"w\"}", "duplicate key"),
    ] {
        let wrong = read(text).expect_err(text);
        assert!(wrong.contains(said), "{text}: {wrong}");
    }
}

#[test]
fn values_with_notations_of_their_own() {
    assert_eq!(Size::parse("128").unwrap().bytes_of_mib(), Some(128 << 20));
    assert_eq!(Size::parse("0x10").unwrap().bytes(), 16);
    assert_eq!(Size::parse("1g").unwrap().bytes_of_mib(), Some(1 << 30));
    assert_eq!(Size::parse("17592186044416").unwrap().bytes_of_mib(), None);
    for bad in ["", "K", "-1", "1.5G", "0x", "0xg", "16E"] {
        assert_eq!(Size::parse(bad), None, "{bad}");
    }
    let address = |text: &str| serde_json::from_value::<PciAddress>(text.into()).ok().map(|it| (it.slot, it.function));
    assert_eq!(address("0x1.0x2"), Some((1, 2)));
    assert_eq!(address("1f.7"), Some((31, 7)));
    assert_eq!(address("10"), Some((16, 0)));
    for bad in ["", ".", "20", "1.8", "1.", "+1", "1.2.3"] {
        assert_eq!(address(bad), None, "{bad}");
    }
    assert_eq!("00112233-4455-6677-8899-aabbCCddeeff".parse::<Uuid>().unwrap().0[10], 0xaa);
    for bad in [
        "",
        "0",
        "00112233-4455-6677-8899-aabbccddeef",
        "00112233445566778899aabbccddeeff",
        "0011223g-4455-6677-8899-aabbccddeeff",
    ] {
        assert!(bad.parse::<Uuid>().is_err(), "{bad}");
    }
}

proptest! {
    #[test]
    fn a_value_reads_back_with_its_commas_doubled(word in "[^{]?.{0,20}", other in ".{0,20}") {
        let text = format!("word={},inner.b={},inner.a=1", word.replace(',', ",,"), other.replace(',', ",,"));
        let read = read(&text).unwrap();
        prop_assert_eq!(read.word, word);
        prop_assert_eq!(read.inner.unwrap().b, Some(other));
    }

    #[test]
    fn numbers_read_back(number: u32, below: i8) {
        let read = read(&format!("w,number={number},below={below},size={number}")).unwrap();
        prop_assert_eq!((read.number, read.below, read.size), (Some(number), Some(below), Some(Size::Plain(number.into()))));
    }

    #[test]
    fn any_text_is_properties_or_refused_in_one_line(text in ".{0,40}") {
        for implied in [None, Some("word")] {
            if let Err(wrong) = Properties::parse(&text, implied).and_then(|it| it.read::<Everything>()) {
                prop_assert!(!wrong.to_string().contains('\u{1b}'), "{}", wrong);
            }
        }
        let _ = Device::parse(&text);
    }

    #[test]
    fn a_device_s_properties_in_any_order(order in Just(["addr=0x1.0x2", "id=pci.1", "bus=pcie.0", "chassis=1", "port=8"]).prop_shuffle()) {
        let device = Device::parse(&format!("pcie-root-port,{}", order.join(","))).unwrap();
        prop_assert_eq!(device.address, Some(PciAddress { slot: 1, function: 2 }));
        prop_assert_eq!((device.id.as_deref(), device.bus.as_deref()), (Some("pci.1"), Some("pcie.0")));
    }
}
