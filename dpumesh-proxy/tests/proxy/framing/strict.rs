//! A reading of HTTP/1.1 that knows only what RFC 9112's grammar has, written apart from the proxy's: what it refuses is ambiguous to
//! somebody. The corpus holds the proxy's judgement, and every octet that leaves it, against this one.

/// How a body's end is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Framing {
    Length,
    Chunked,
    UntilClose,
}

/// A message as it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Message {
    /// The words of the first line: three of a request, version and status of a response.
    pub(super) first: Vec<Vec<u8>>,
    /// Names in lower case, in order.
    pub(super) fields: Vec<(Vec<u8>, Vec<u8>)>,
    pub(super) framing: Framing,
    pub(super) body: Vec<u8>,
}

/// Why there is no further message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// Nothing is left.
    Clean,
    /// More octets are needed.
    Incomplete,
    /// No further message can be read for sure.
    Bad(&'static str),
}

impl Message {
    pub(super) fn values<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a [u8]> {
        let all = self.fields.iter();
        all.filter(move |(n, _)| n == name.as_bytes())
            .map(|(_, v)| v.as_slice())
    }

    pub(super) fn status(&self) -> &str {
        std::str::from_utf8(&self.first[1]).unwrap()
    }
}

/// Every request at the front of `octets`.
pub(super) fn requests(mut octets: &[u8]) -> (Vec<Message>, End) {
    let mut all = Vec::new();
    while !octets.is_empty() {
        match request(octets) {
            Ok((message, rest)) => {
                all.push(message);
                octets = rest;
            }
            Err(end) => return (all, end),
        }
    }
    (all, End::Clean)
}

fn request(octets: &[u8]) -> Result<(Message, &[u8]), End> {
    let (line, rest) = line(octets)?;
    let words: Vec<Vec<u8>> = line.split(|b| *b == b' ').map(<[u8]>::to_vec).collect();
    let [method, target, version] = words.as_slice() else {
        return Err(End::Bad("a request line is three words"));
    };
    if method.is_empty() || !method.iter().all(|b| is_token(*b)) {
        return Err(End::Bad("a method is a token"));
    }
    if target.is_empty() || !target.iter().all(u8::is_ascii_graphic) || target.contains(&b'#') {
        return Err(End::Bad("a target is visible ASCII without a fragment"));
    }
    let http11 = match version.as_slice() {
        b"HTTP/1.1" => true,
        b"HTTP/1.0" => false,
        _ => return Err(End::Bad("a version is HTTP/1.0 or HTTP/1.1")),
    };
    let (fields, rest) = fields(rest)?;
    let mut message = Message {
        first: words,
        fields,
        framing: Framing::Length,
        body: Vec::new(),
    };
    if message.values("host").count() != 1 && http11 {
        return Err(End::Bad("a request has one host"));
    }
    let length = length(&message, http11)?;
    let rest = body(&mut message, length.unwrap_or(Length::Octets(0)), rest, false)?;
    Ok((message, rest))
}

/// The response at the front of `octets`; `ended`: nothing follows.
pub(super) fn response<'a>(octets: &'a [u8], method: &str, ended: bool) -> Result<(Message, &'a [u8]), End> {
    let (line, rest) = line(octets)?;
    let mut words = line.splitn(3, |b| *b == b' ');
    let (version, status) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let reason = words.next().ok_or(End::Bad("a blank stands behind the status"))?;
    let http11 = match version {
        b"HTTP/1.1" => true,
        b"HTTP/1.0" => false,
        _ => return Err(End::Bad("a version is HTTP/1.0 or HTTP/1.1")),
    };
    if status.len() != 3 || !status.iter().all(u8::is_ascii_digit) || status[0] == b'0' {
        return Err(End::Bad("a status is three digits"));
    }
    if !reason.iter().all(|b| is_text(*b)) {
        return Err(End::Bad("a reason phrase is text"));
    }
    let (fields, rest) = fields(rest)?;
    let mut message = Message {
        first: vec![version.to_vec(), status.to_vec()],
        fields,
        framing: Framing::Length,
        body: Vec::new(),
    };
    let length = length(&message, http11)?;
    if method == "HEAD" || status[0] == b'1' || matches!(status, b"204" | b"304") {
        return Ok((message, rest));
    }
    let rest = body(&mut message, length.unwrap_or(Length::UntilClose), rest, ended)?;
    Ok((message, rest))
}

enum Length {
    Octets(usize),
    Chunked,
    UntilClose,
}

fn length(message: &Message, http11: bool) -> Result<Option<Length>, End> {
    let codings: Vec<_> = message.values("transfer-encoding").collect();
    let lengths: Vec<_> = message.values("content-length").collect();
    match (codings.as_slice(), lengths.as_slice()) {
        ([], []) => Ok(None),
        ([coding], []) if http11 && coding.eq_ignore_ascii_case(b"chunked") => Ok(Some(Length::Chunked)),
        ([], [length]) if !length.is_empty() && length.iter().all(u8::is_ascii_digit) => {
            let length = std::str::from_utf8(length).unwrap().parse();
            length
                .map(|n| Some(Length::Octets(n)))
                .map_err(|_| End::Bad("a length that nobody can hold"))
        }
        _ => Err(End::Bad("a body has one length")),
    }
}

fn body<'a>(
    message: &mut Message,
    length: Length,
    mut octets: &'a [u8],
    ended: bool,
) -> Result<&'a [u8], End> {
    match length {
        Length::Octets(length) => {
            let (body, rest) = octets.split_at_checked(length).ok_or(End::Incomplete)?;
            message.body = body.to_vec();
            Ok(rest)
        }
        Length::UntilClose => {
            message.framing = Framing::UntilClose;
            message.body = octets.to_vec();
            if ended { Ok(b"") } else { Err(End::Incomplete) }
        }
        Length::Chunked => {
            message.framing = Framing::Chunked;
            loop {
                let (size, rest) = line(octets)?;
                let size = chunk_size(size)?;
                if size == 0 {
                    return fields(rest).map(|(_, rest)| rest);
                }
                let (data, rest) = rest.split_at_checked(size).ok_or(End::Incomplete)?;
                message.body.extend_from_slice(data);
                octets = match rest {
                    [b'\r', b'\n', rest @ ..] => rest,
                    [] | [b'\r'] => return Err(End::Incomplete),
                    _ => return Err(End::Bad("data ends with its size")),
                };
            }
        }
    }
}

fn chunk_size(line: &[u8]) -> Result<usize, End> {
    let end = line.iter().position(|b| *b == b';').unwrap_or(line.len());
    let (size, extensions) = line.split_at(end);
    let known = extension();
    if size.is_empty() || !size.iter().all(u8::is_ascii_hexdigit) || !known.is_match(extensions) {
        return Err(End::Bad("a chunk's size is hexadecimal digits, and extensions"));
    }
    usize::from_str_radix(std::str::from_utf8(size).unwrap(), 16)
        .map_err(|_| End::Bad("a size nobody can hold"))
}

/// `chunk-ext` without optional blanks.
fn extension() -> &'static regex::bytes::Regex {
    static EXTENSION: std::sync::OnceLock<regex::bytes::Regex> = std::sync::OnceLock::new();
    const TOKEN: &str = "[!#$%&'*+.^_`|~0-9A-Za-z-]+";
    EXTENSION.get_or_init(|| {
        let quoted = r#""(?:[\t \x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t \x21-\x7e\x80-\xff])*""#;
        regex::bytes::Regex::new(&format!("(?-u)^(?:;{TOKEN}(?:=(?:{TOKEN}|{quoted}))?)*$")).unwrap()
    })
}

type Lines = Vec<(Vec<u8>, Vec<u8>)>;

fn fields(mut octets: &[u8]) -> Result<(Lines, &[u8]), End> {
    let mut all = Vec::new();
    loop {
        let (text, rest) = line(octets)?;
        octets = rest;
        if text.is_empty() {
            return Ok((all, octets));
        }
        let colon = text
            .iter()
            .position(|b| *b == b':')
            .ok_or(End::Bad("a field has a colon"))?;
        let (name, value) = (&text[..colon], &text[colon + 1..]);
        if name.is_empty() || !name.iter().all(|b| is_token(*b)) {
            return Err(End::Bad("a field's name is a token"));
        }
        if !value.iter().all(|b| is_text(*b)) {
            return Err(End::Bad("a field's value is text"));
        }
        all.push((name.to_ascii_lowercase(), trim(value).to_vec()));
    }
}

/// The first line without its CRLF. CR and LF stand nowhere else.
fn line(octets: &[u8]) -> Result<(&[u8], &[u8]), End> {
    let Some(at) = octets.iter().position(|b| matches!(b, b'\r' | b'\n')) else {
        return Err(End::Incomplete);
    };
    match &octets[at..] {
        [b'\r', b'\n', rest @ ..] => Ok((&octets[..at], rest)),
        [b'\r'] => Err(End::Incomplete),
        _ => Err(End::Bad("a line ends with CR LF")),
    }
}

fn is_token(byte: u8) -> bool {
    byte.is_ascii_graphic() && !br#""(),/:;<=>?@[\]{}"#.contains(&byte)
}

fn is_text(byte: u8) -> bool {
    byte == b'\t' || byte == b' ' || byte.is_ascii_graphic() || byte >= 0x80
}

fn trim(value: &[u8]) -> &[u8] {
    let blank = |b: &u8| matches!(b, b' ' | b'\t');
    let start = value.iter().position(|b| !blank(b)).unwrap_or(value.len());
    let end = value.iter().rposition(|b| !blank(b)).map_or(start, |at| at + 1);
    &value[start..end]
}
