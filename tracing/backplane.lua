-- Wireshark's dissector for frames of Backplane's bus: packets of link type USER0 as tracing/pcapng.py writes
-- them. Load it with -X lua_script:FILE, or put it into Wireshark's folder of plugins.
--
-- Judges a frame as bus/codec.py does: what that calls no frame has an expert info of the group Malformed here.
-- Left out: the types of msgpack's extensions. Runs with Lua 5.2 (Wireshark 4.0 to 4.2) and 5.4.

-- kind -> name, direction, fields: name, type, name in filters. From bus/frames.py by `python -m tracing.luagen`
-- generated: begin
local PROTOCOL_VERSION = 4
local KINDS = {
  [1] = {"Read", "request", {{"region", "str", "region"}, {"offset", "uint", "offset"}, {"width", "uint", "width"}, {"writes", "writes", "writes"}}},
  [2] = {"ReadReply", "reply", {{"value", "uint", "value"}}},
  [3] = {"Write", "request", {{"region", "str", "region"}, {"offset", "uint", "offset"}, {"width", "uint", "width"}, {"value", "uint", "value"}}},
  [4] = {"WriteReply", "reply", {}},
  [5] = {"PostedBatch", "one-way", {{"writes", "writes", "writes"}}},
  [6] = {"StringIn", "request", {{"region", "str", "region"}, {"offset", "uint", "offset"}, {"width", "uint", "width"}, {"count", "uint", "count"}}},
  [7] = {"StringInReply", "reply", {{"data", "bin", "stringinreply.data"}}},
  [8] = {"StringOut", "request", {{"region", "str", "region"}, {"offset", "uint", "offset"}, {"width", "uint", "width"}, {"data", "bin", "stringout.data"}}},
  [9] = {"StringOutReply", "reply", {}},
  [16] = {"Line", "one-way", {{"irq", "uint", "irq"}, {"level", "bool", "level"}, {"source", "str", "source"}}},
  [17] = {"Intr", "one-way", {{"level", "bool", "level"}}},
  [18] = {"IntAck", "request", {}},
  [19] = {"IntAckReply", "reply", {{"vector", "uint?", "vector"}}},
  [20] = {"ApicMessage", "one-way", {{"vector", "uint", "vector"}, {"delivery_mode", "uint", "delivery_mode"}, {"dest", "uint", "dest"}, {"dest_mode", "uint", "dest_mode"}, {"trigger_level", "bool", "trigger_level"}, {"level_assert", "bool", "level_assert"}}},
  [21] = {"Eoi", "one-way", {{"vector", "uint", "vector"}}},
  [32] = {"Ping", "request", {}},
  [33] = {"Pong", "reply", {}},
  [34] = {"Reset", "request", {{"start", "map", "start"}}},
  [35] = {"ResetReply", "reply", {}},
  [36] = {"Stats", "request", {}},
  [37] = {"StatsReply", "reply", {{"counters", "map", "counters"}}},
  [38] = {"Save", "request", {}},
  [39] = {"SaveReply", "reply", {{"state", "map", "state"}}},
  [40] = {"Load", "request", {{"state", "map", "state"}}},
  [41] = {"LoadReply", "reply", {}},
  [42] = {"Shutdown", "one-way", {}},
  [43] = {"Event", "one-way", {{"kind", "str", "event.kind"}, {"text", "str", "text"}, {"data", "map", "event.data"}}},
  [44] = {"Refused", "reply", {{"reason", "str", "reason"}}},
  [45] = {"Timing", "request", {{"on", "bool", "on"}}},
  [46] = {"TimingReply", "reply", {}},
  [47] = {"Ack", "one-way", {{"first", "uint", "first"}}},
  [48] = {"Resume", "one-way", {{"first", "uint", "first"}}},
  [49] = {"Attend", "one-way", {{"node", "str", "node"}}},
  [50] = {"Recording", "one-way", {}},
  [64] = {"Pause", "request", {}},
  [65] = {"PauseReply", "reply", {{"clock_ns", "uint", "pausereply.clock_ns"}, {"frames", "map", "frames"}}},
  [66] = {"Continue", "request", {{"clock_ns", "uint", "continue.clock_ns"}, {"host_ns", "uint", "host_ns"}}},
  [67] = {"ContinueReply", "reply", {}},
}
-- generated: end

local backplane = Proto("backplane", "Backplane bus")
local names = {}
for id, kind in pairs(KINDS) do names[id] = kind[1] end

local f = {
  sender = ProtoField.string("backplane.sender", "Sender"),
  receiver = ProtoField.string("backplane.receiver", "Receiver"),
  taken = ProtoField.uint64("backplane.taken", "Taken (ns, CLOCK_MONOTONIC)"),
  done = ProtoField.uint64("backplane.done", "Done (ns, CLOCK_MONOTONIC)"),
  wait = ProtoField.double("backplane.wait", "Wait, from sent to taken (µs)"),
  handling = ProtoField.double("backplane.handling", "Handling, from taken to done (µs)"),
  version = ProtoField.uint64("backplane.version", "Version"),
  kind = ProtoField.uint32("backplane.kind", "Kind", base.DEC, names),
  kind_name = ProtoField.string("backplane.name", "Name"),
  seq = ProtoField.uint64("backplane.seq", "Number in the stream"),
  ack = ProtoField.uint64("backplane.ack", "Acknowledged"),
  trace = ProtoField.uint64("backplane.trace", "Trace (chain)", base.HEX_DEC),
  span = ProtoField.uint64("backplane.span", "Span", base.HEX_DEC),
  clock = ProtoField.uint64("backplane.clock", "Sent (ns, CLOCK_MONOTONIC)"),
  request_in = ProtoField.framenum("backplane.request_in", "Request in", base.NONE, frametype.REQUEST),
  response_in = ProtoField.framenum("backplane.response_in", "Response in", base.NONE, frametype.RESPONSE),
  response_time = ProtoField.double("backplane.response_time", "From the request sent to the answer taken (µs)"),
  write = ProtoField.none("backplane.write", "Write"),
  item = ProtoField.string("backplane.item", "Item"),
}
local e = {
  malformed = ProtoExpert.new("backplane.malformed", "Malformed frame", expert.group.MALFORMED, expert.severity.ERROR),
  cut = ProtoExpert.new("backplane.cut", "Frame cut", expert.group.PROTOCOL, expert.severity.NOTE),
  refused = ProtoExpert.new("backplane.refused", "Refused", expert.group.RESPONSE_CODE, expert.severity.WARN),
}
local HEX = { offset = true, value = true, vector = true, dest = true }
local by_name = {} -- name in filters -> ProtoField
for _, kind in pairs(KINDS) do
  for _, field in ipairs(kind[3]) do
    local name, type, filter = field[1], field[2], field[3]
    if not by_name[filter] then
      local long = "backplane." .. filter
      if type == "uint" or type == "uint?" then
        by_name[filter] = ProtoField.uint64(long, name, HEX[name] and base.HEX_DEC or base.DEC)
      elseif type == "bool" then
        by_name[filter] = ProtoField.bool(long, name)
      elseif type == "str" then
        by_name[filter] = ProtoField.string(long, name)
      elseif type == "bin" then
        by_name[filter] = ProtoField.bytes(long, name)
      else -- map, writes
        by_name[filter] = ProtoField.none(long, name)
      end
    end
  end
end
local all = {}
for _, field in pairs(f) do all[#all + 1] = field end
for _, field in pairs(by_name) do all[#all + 1] = field end
backplane.fields = all
backplane.experts = { e.malformed, e.cut, e.refused }

-- msgpack -------------------------------------------------------------------------------------------------

local DEPTH = 500
local END = "ends too early"

-- As Python's strict UTF-8.
local function is_utf8(s)
  local at, size = 1, #s
  while at <= size do
    local a, b, c, d = s:byte(at, at + 3)
    local function tail(x) return x and x >= 0x80 and x <= 0xBF end
    if a < 0x80 then at = at + 1
    elseif a >= 0xC2 and a <= 0xDF and tail(b) then at = at + 2
    elseif a >= 0xE0 and a <= 0xEF and tail(b) and tail(c) and not (a == 0xE0 and b < 0xA0)
        and not (a == 0xED and b > 0x9F) then at = at + 3
    elseif a >= 0xF0 and a <= 0xF4 and tail(b) and tail(c) and tail(d) and not (a == 0xF0 and b < 0x90)
        and not (a == 0xF4 and b > 0x8F) then at = at + 4
    else return false end
  end
  return true
end

local decode

local function array(buf, node, at, count, depth)
  node.t = "array"
  for i = 1, count do
    local item, next_at, wrong = decode(buf, at, depth + 1)
    if item then node[i] = item end
    if wrong then return node, at, wrong end
    at = next_at
  end
  node.len = at - node.at
  return node, at
end

local function map(buf, node, at, count, depth)
  node.t, node.keys = "map", {}
  for i = 1, count do
    local key, value, wrong
    key, at, wrong = decode(buf, at, depth + 1)
    if wrong then return node, at, wrong end
    if key.t ~= "str" and key.t ~= "bin" then return node, at, "a map's key is no string" end
    value, at, wrong = decode(buf, at, depth + 1)
    if value then node.keys[i], node[i] = key, value end
    if wrong then return node, at, wrong end
  end
  node.len = at - node.at
  return node, at
end

local function text(buf, node, at, size, kind)
  if at + size > buf:len() then return nil, at, END end
  node.t, node.body, node.len = kind, size > 0 and buf(at, size) or nil, at + size - node.at
  node.v = size > 0 and buf:raw(at, size) or ""
  if kind == "str" and not is_utf8(node.v) then return node, at + size, "a string is no UTF-8" end
  return node, at + size
end

local function ext(buf, node, at, size)
  if at + 1 + size > buf:len() then return nil, at, END end
  node.t, node.len, node.v = "ext", at + 1 + size - node.at, "extension " .. buf(at, 1):int()
  if buf(at, 1):int() == -1 and size ~= 4 and size ~= 8 and size ~= 12 then
    return node, at + 1 + size, "a timestamp of " .. size .. " bytes"
  end
  return node, at + 1 + size
end

-- The item at `at`: node, offset behind it, and what is wrong. What there is of a bad one comes, too.
-- A node: t (uint, int, nil, bool, float, str, bin, array, map, ext), v, at, len; items of arrays and maps.
function decode(buf, at, depth)
  if at >= buf:len() then return nil, at, END end
  local node = { at = at, len = 1 }
  local tag = buf(at, 1):uint()
  at = at + 1
  local function number(size) -- of the next bytes
    if at + size > buf:len() then return nil end
    at = at + size
    return size < 5 and buf(at - size, size):uint() or buf(at - size, size):uint64()
  end
  if depth > DEPTH then return nil, at, "nested too deep" end
  if tag < 0x80 then node.t, node.v = "uint", UInt64(tag)
  elseif tag < 0x90 then return map(buf, node, at, tag - 0x80, depth)
  elseif tag < 0xA0 then return array(buf, node, at, tag - 0x90, depth)
  elseif tag < 0xC0 then return text(buf, node, at, tag - 0xA0, "str")
  elseif tag == 0xC0 then node.t = "nil"
  elseif tag == 0xC1 then return nil, at, "a byte that msgpack never uses"
  elseif tag == 0xC2 or tag == 0xC3 then node.t, node.v = "bool", tag == 0xC3
  elseif tag >= 0xE0 then node.t, node.v = "int", Int64(tag - 256)
  elseif tag >= 0xCC and tag <= 0xCF then
    local size = 2 ^ (tag - 0xCC)
    local v = number(size)
    if not v then return nil, at, END end
    node.t, node.v, node.len = "uint", size < 5 and UInt64(v) or v, 1 + size
  elseif tag >= 0xD0 and tag <= 0xD3 then
    local size = 2 ^ (tag - 0xD0)
    if at + size > buf:len() then return nil, at, END end
    local range = buf(at, size)
    local v = size < 5 and Int64(range:int()) or range:int64()
    node.t, node.v, node.len = v < Int64(0) and "int" or "uint", v, 1 + size
    if node.t == "uint" then node.v = range:uint64() end
    at = at + size
  elseif tag == 0xCA or tag == 0xCB then
    local size = tag == 0xCA and 4 or 8
    if at + size > buf:len() then return nil, at, END end
    node.t, node.v, node.len = "float", buf(at, size):float(), 1 + size
    at = at + size
  elseif tag >= 0xD4 and tag <= 0xD8 then return ext(buf, node, at, 2 ^ (tag - 0xD4))
  else
    local first = ({ [0xC4] = 0xC4, [0xC5] = 0xC4, [0xC6] = 0xC4, [0xC7] = 0xC7, [0xC8] = 0xC7, [0xC9] = 0xC7,
      [0xD9] = 0xD9, [0xDA] = 0xD9, [0xDB] = 0xD9, [0xDC] = 0xDB, [0xDD] = 0xDB, [0xDE] = 0xDD, [0xDF] = 0xDD })[tag]
    local count = number(2 ^ (tag - first))
    if not count then return nil, at, END end
    if first == 0xC4 then return text(buf, node, at, count, "bin") end
    if first == 0xD9 then return text(buf, node, at, count, "str") end
    if first == 0xC7 then return ext(buf, node, at, count) end
    if first == 0xDB then return array(buf, node, at, count, depth) end
    return map(buf, node, at, count, depth)
  end
  return node, at
end

-- A value as short text.
local function shown(node)
  local t = node.t
  if t == "nil" then return "nil" end
  if t == "str" then return '"' .. node.v:gsub("[%c]", ".") .. '"' end
  if t == "bin" then return node.body and node.body:bytes():tohex(true):sub(1, 64) or "no bytes" end
  if t == "array" then return #node .. " items" end
  if t == "map" then return #node .. " entries" end
  return tostring(node.v)
end

local function any(tree, buf, node, label, depth)
  local item = tree:add(f.item, buf(node.at, node.len), label .. ": " .. shown(node))
  item:set_text(label .. ": " .. shown(node))
  if depth > 12 then return end
  for i, value in ipairs(node) do
    any(item, buf, value, node.keys and (node.keys[i].v:gsub("[%c]", ".")) or "[" .. i - 1 .. "]", depth + 1)
  end
end

-- Fields --------------------------------------------------------------------------------------------------

local function hex(v)
  local digits = v:tohex():gsub("^0+", "")
  return "0x" .. (digits == "" and "0" or digits)
end

-- An offset of a register.
local function place(v)
  return v < UInt64(10) and tostring(v) or hex(v)
end

-- Adds one of PostedBatch.writes; its short text, or nil: it is none.
local function write(tree, buf, node)
  local region, offset, width, value = node[1], node[2], node[3], node[4]
  if node.t ~= "array" or #node ~= 4 or region.t ~= "str" or offset.t ~= "uint" or width.t ~= "uint"
      or value.t ~= "uint" then
    return nil
  end
  local short = region.v .. "+" .. place(offset.v) .. " = " .. hex(value.v)
  local item = tree:add(f.write, buf(node.at, node.len))
  item:set_text("Write: " .. short .. (width.v == UInt64(0) and " (read from a latch)" or ""))
  item:add(by_name.region, buf(region.at, region.len), region.v)
  item:add(by_name.offset, buf(offset.at, offset.len), offset.v)
  item:add(by_name.width, buf(width.at, width.len), width.v)
  item:add(by_name.value, buf(value.at, value.len), value.v)
  return short
end

-- Adds a field; its value for the info column, or nil and what is wrong.
local function field(tree, buf, node, described)
  local name, type, proto = described[1], described[2], by_name[described[3]]
  local range = buf(node.at, node.len)
  if type == "uint?" and node.t == "nil" then
    tree:add(range, name .. ": nil")
    return "nil"
  elseif type == "uint" or type == "uint?" then
    if node.t ~= "uint" then return nil, name .. " is no unsigned integer" end
    tree:add(proto, range, node.v)
    if name == "offset" then return place(node.v) end
    return HEX[name] and hex(node.v) or tostring(node.v)
  elseif type == "writes" then
    if node.t ~= "array" then return nil, name .. " are no array" end
    local item, texts = tree:add(proto, range), {}
    item:set_text(name .. ": " .. #node)
    for i, one in ipairs(node) do
      local short = write(item, buf, one)
      if not short then return nil, "item " .. i .. " of " .. name .. " is no write" end
      texts[i] = short
    end
    return table.concat(texts, ", ")
  elseif node.t ~= type then
    return nil, name .. " is no " .. type
  elseif type == "map" then
    local item = tree:add(proto, range)
    item:set_text(name .. ": " .. shown(node))
    for i, value in ipairs(node) do any(item, buf, value, (node.keys[i].v:gsub("[%c]", ".")), 0) end
    return shown(node)
  elseif type == "bin" then
    local item = tree:add(proto, node.body or range)
    if not node.body then item:set_text(name .. ": no bytes") end
    return (node.body and node.body:len() or 0) .. " bytes"
  end
  tree:add(proto, range, node.v)
  return type == "str" and (node.v:gsub("[%c]", ".")) or tostring(node.v)
end

-- The info column, by kind; `v`: the fields' texts by name. Others: "Kind name=text ...".
local function counted(v, field_name)
  return v[field_name] and v[field_name] ~= "" and "after " .. v[field_name] or ""
end
local function with_writes(first, v)
  local more = counted(v, "writes")
  return more == "" and first or first .. ", " .. more
end
local INFO = {
  Read = function(v, to) return with_writes("Read " .. to .. " " .. v.region .. "+" .. v.offset, v) end,
  ReadReply = function(v) return "ReadReply = " .. v.value end,
  Write = function(v, to) return "Write " .. to .. " " .. v.region .. "+" .. v.offset .. " = " .. v.value end,
  PostedBatch = function(v, to) return "PostedBatch " .. to .. " " .. v.writes end,
  StringIn = function(v, to) return "StringIn " .. to .. " " .. v.region .. "+" .. v.offset .. " × " .. v.count end,
  StringOut = function(v, to) return "StringOut " .. to .. " " .. v.region .. "+" .. v.offset .. ": " .. v.data end,
  Line = function(v) return "Line " .. v.irq .. (v.level == "true" and " high" or " low") .. ", by " .. v.source end,
  Intr = function(v) return "Intr " .. (v.level == "true" and "high" or "low") end,
  IntAckReply = function(v) return "IntAckReply vector " .. v.vector end,
  ApicMessage = function(v) return "ApicMessage vector " .. v.vector .. " to " .. v.dest end,
  Eoi = function(v) return "Eoi vector " .. v.vector end,
  Event = function(v) return "Event " .. v.kind .. " " .. v.text end,
  Refused = function(v) return "Refused: " .. v.reason end,
}

local requests, answers, asked, answered = {}, {}, {}, {}
function backplane.init() requests, answers, asked, answered = {}, {}, {}, {} end

-- Requests and answers find each other by trace and span. First pass: in order; a request that was asked again
-- (its first taker died) has the same answer.
local function link(pinfo, tree, kind, trace, span, clock, taken)
  local key, number = tostring(trace) .. ":" .. tostring(span), pinfo.number
  if kind[2] == "request" then
    if not pinfo.visited then
      asked[number] = key
      requests[key] = { number = number, clock = clock }
    end
    local answer = answers[asked[number]]
    if answer then tree:add(f.response_in, answer):set_generated() end
  elseif kind[2] == "reply" then
    if not pinfo.visited then
      answered[number] = requests[key]
      if requests[key] then answers[key] = number end
    end
    local request = answered[number]
    if request then
      tree:add(f.request_in, request.number):set_generated()
      if taken >= request.clock then
        tree:add(f.response_time, (taken - request.clock):tonumber() / 1000):set_generated()
      end
    end
  end
end

local unpack_ = table.unpack or unpack
local HEADER = { "version", "kind", "seq", "ack", "trace", "span", "clock" }

-- The frame in `buf` (a Tvb of its own), judged as bus/codec.py does; the info column, and what is wrong.
local function frame(buf, pinfo, tree, receiver, taken)
  local root, behind, wrong = decode(buf, 0, 0)
  if not wrong and behind < buf:len() then wrong = "bytes behind the frame" end
  if not root or root.t ~= "array" then return "?", wrong or "no array with a header" end
  local head = {}
  for i, name in ipairs(HEADER) do
    local node = root[i]
    if not node then return "?", wrong or "no array with a header" end
    if node.t ~= "uint" then return "?", wrong or name .. " is no unsigned integer" end
    head[name] = node.v
    local range = buf(node.at, node.len)
    if i ~= 2 then
      tree:add(f[name], range, node.v)
      if i == 1 and node.v ~= UInt64(PROTOCOL_VERSION) then
        return "?", wrong or "protocol version " .. tostring(node.v) .. ", this is " .. PROTOCOL_VERSION
      end
    end
  end
  local id = head.kind < UInt64(2 ^ 31) and head.kind:tonumber() or -1
  local kind, range = KINDS[id], buf(root[2].at, root[2].len)
  if not kind then return "?", wrong or "unknown kind " .. tostring(head.kind) end
  tree:add(f.kind, range, id)
  tree:add(f.kind_name, range, kind[1]):set_hidden()
  tree:append_text(": " .. kind[1])
  if taken >= head.clock then
    tree:add(f.wait, (taken - head.clock):tonumber() / 1000):set_generated()
  end
  link(pinfo, tree, kind, head.trace, head.span, head.clock, taken)
  local values, texts = {}, {}
  for i, described in ipairs(kind[3]) do
    local node = root[#HEADER + i]
    if not node then return kind[1], wrong or kind[1] .. " has too few fields" end
    local value, bad = field(tree, buf, node, described)
    if not value then return kind[1], wrong or bad end
    values[described[1]] = value
    texts[i] = described[1] .. "=" .. value
  end
  if not wrong and #root ~= #HEADER + #kind[3] then
    return kind[1], kind[1] .. " has " .. #kind[3] .. " fields, got " .. #root - #HEADER
  end
  local info = INFO[kind[1]]
  if kind[1] == "Refused" then tree:add_proto_expert_info(e.refused, "refused: " .. values.reason) end
  return info and info(values, receiver) or table.concat({ kind[1], unpack_(texts) }, " "), wrong
end

function backplane.dissector(buf, pinfo, root)
  pinfo.cols.protocol = "Backplane"
  local tree = root:add(backplane, buf())
  local function malformed(reason)
    tree:add_proto_expert_info(e.malformed, reason)
    pinfo.cols.info = "Malformed: " .. reason
  end
  if buf:len() < 20 or buf(0, 1):uint() ~= 1 then return malformed("no pseudo header of version 1") end
  local from, to = buf(2, 1):uint(), buf(3, 1):uint()
  local begin = 20 + from + to
  if buf:len() < begin then return malformed("the pseudo header is cut short") end
  local sender = from > 0 and buf(20, from):string(ENC_UTF_8) or ""
  local receiver = to > 0 and buf(20 + from, to):string(ENC_UTF_8) or ""
  local taken, done = buf(4, 8):uint64(), buf(12, 8):uint64()
  pinfo.cols.src, pinfo.cols.dst = sender, receiver
  tree:set_len(buf:len())
  local way = tree:add(backplane, buf(0, begin))
  way:set_text("Way: " .. sender .. " to " .. receiver)
  way:add(f.sender, buf(2, 1), sender)
  way:add(f.receiver, buf(3, 1), receiver)
  way:add(f.taken, buf(4, 8), taken)
  if done == UInt64(0) then
    way:add(f.done, buf(12, 8), done):append_text(" (it wasn't, or no step of a device)")
  else
    way:add(f.done, buf(12, 8), done)
    if done >= taken then way:add(f.handling, (done - taken):tonumber() / 1000):set_generated() end
  end
  local real, there = buf:reported_len() - begin, buf:len() - begin
  if there == 0 then
    if real == 0 then return malformed("no bytes") end
    pinfo.cols.info = "Cut: nothing of " .. real .. " bytes"
    return tree:add_proto_expert_info(e.cut, "nothing of " .. real .. " bytes was noted")
  end
  local info, wrong = frame(buf(begin):tvb(), pinfo, tree, receiver, taken)
  if wrong and not (wrong == END and there < real) then return malformed(wrong) end
  if there < real then
    tree:add_proto_expert_info(e.cut, "only " .. there .. " of " .. real .. " bytes were noted")
    info = info .. " (cut)"
  end
  pinfo.cols.info = info
end

DissectorTable.get("wtap_encap"):add(wtap.USER0, backplane)
