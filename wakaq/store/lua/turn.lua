-- One turn of a supervisor: settles what its workers report, then claims what they can take next. A
-- turn happens once, however often it is sent: it carries its number and the token that the turn
-- before was answered with, and the server remembers number, token and what it gave.
--
-- KEYS[1]  hash, supervisor id -> 'number token gave' of its last turn
-- KEYS     then six a queue: queue (list), head (list), in flight (hash), delayed (zset), dead
--          letters (list), stats (hash); operations name a queue by its place, 0 for the first
-- ARGV[1]  supervisor id             ARGV[2]  number of this turn
-- ARGV[3]  token of the turn before  ARGV[4]  how many to claim, most
-- ARGV[5]  the number that the first of them is to have
-- ARGV     then operations, each with a queue:
--   ack       queue n (from to)*n             done: these ranges of numbers
--   requeue   queue number                    back to the front, as it is
--   redeliver queue number payload            back to the front, as a new payload
--   retry     queue number payload            to the end, as a new payload
--   delay     queue number payload seconds    due in that time, as a new payload
--   dead      queue number letter kept        a dead letter, of which so many are kept
--
-- Returns nil if the turn is not the next one: the supervisor is evicted. Else one string, which
-- costs a client much less than a list: numbers up to a newline, then texts. The numbers are the
-- token, how many settlements failed and which (1 for the first operation), then for each group of
-- texts: the place of a queue, the first number, how many texts, and their lengths. Texts of place
-- -1 are errors.
--
-- A script is not rolled back. So every move writes before it removes, and what could not be pushed
-- stays in flight, under its number, and is reported: one broken key holds up its own queue and no
-- other.

local QUEUE, HEAD, INFLIGHT, DELAYED, DEAD, STATS = 0, 1, 2, 3, 4, 5
local CHUNK = 1000 -- what `unpack` can take is limited
-- A small hash of short texts is searched from end to end. The name of this field is too long for
-- that: once it was in there, the server keeps a table, in which the rest is found at once (half of
-- its time with 256 claims a turn).
local LONG_FIELD, MANY = string.rep('-', 65), 32
local supervisor_id, number, token = ARGV[1], ARGV[2], ARGV[3]
local want, next_number = tonumber(ARGV[4]), tonumber(ARGV[5])

local state = redis.call('HGET', KEYS[1], supervisor_id)
if not state then return false end
local last_number, last_token, given = string.match(state, '^(%d+) (%d+) ?(.*)$')
local is_repeated = last_number == number
if not is_repeated and (tonumber(last_number) ~= tonumber(number) - 1 or last_token ~= token) then
  return false
end

local groups, texts, errors, failed = {}, {''}, {}, {}
local function key(place, kind) return KEYS[2 + 6 * place + kind] end

local function give(place, first, payloads)
  groups[#groups + 1] = place
  groups[#groups + 1] = first
  groups[#groups + 1] = #payloads
  for _, payload in ipairs(payloads) do
    groups[#groups + 1] = #payload
    texts[#texts + 1] = payload
  end
end

-- Runs a command and returns its reply; of an error it takes note, and returns nil.
local function try(command, name, ...)
  local reply = redis.pcall(command, name, ...)
  if type(reply) == 'table' and reply.err then
    errors[#errors + 1] = name .. ': ' .. reply.err
    return nil
  end
  return reply
end

local function count(place, field, n)
  if n > 0 then try('HINCRBY', key(place, STATS), field, n) end
end

-- How many arguments an operation has behind its queue.
local SIZES = {requeue = 1, redeliver = 2, retry = 2, delay = 3, dead = 3}

local function acknowledge(place, at)
  for i = at + 1, at + 2 * ARGV[at], 2 do
    local from, to = tonumber(ARGV[i]), tonumber(ARGV[i + 1])
    for start = from, to, CHUNK do
      local numbers = {}
      for n = start, math.min(start + CHUNK - 1, to) do numbers[#numbers + 1] = n end
      count(place, 'done', try('HDEL', key(place, INFLIGHT), unpack(numbers)) or 0)
    end
  end
end

-- Pushes somewhere else what is still in flight under a number; returns whether that is settled.
local function move(name, place, at)
  local payload = try('HGET', key(place, INFLIGHT), ARGV[at])
  if not payload then return true end -- it is somebody else's by now
  local new, is_pushed, field = ARGV[at + 1], nil, nil
  if name == 'requeue' then
    is_pushed = try('LPUSH', key(place, QUEUE), payload)
  elseif name == 'redeliver' then
    is_pushed, field = try('LPUSH', key(place, QUEUE), new), 'redelivered'
  elseif name == 'retry' then
    is_pushed, field = try('RPUSH', key(place, QUEUE), new), 'retried'
  elseif name == 'delay' then
    local now = redis.call('TIME')
    local due = string.format('%.6f', now[1] + now[2] / 1e6 + ARGV[at + 2])
    is_pushed, field = try('ZADD', key(place, DELAYED), due, new), 'retried'
  elseif name == 'dead' then
    local kept = tonumber(ARGV[at + 2])
    is_pushed, field = kept == 0 or try('LPUSH', key(place, DEAD), new), 'dead'
    if is_pushed and kept > 0 then redis.call('LTRIM', key(place, DEAD), 0, kept - 1) end
  else
    error('no operation ' .. name)
  end
  if not is_pushed then return false end
  redis.call('HDEL', key(place, INFLIGHT), ARGV[at])
  if field then count(place, field, 1) end
  return true
end

local function size_of(name, at)
  return name == 'ack' and 1 + 2 * tonumber(ARGV[at]) or SIZES[name]
end

-- Runs the operations; where they were run before, only looks which of them had failed.
local function settle()
  local at, index = 6, 0
  while at <= #ARGV do
    local name, place = ARGV[at], tonumber(ARGV[at + 1])
    index, at = index + 1, at + 2
    local is_settled = true
    if is_repeated then -- a settlement failed if its number is still there
      local is_ack = name == 'ack'
      is_settled = is_ack or redis.pcall('HEXISTS', key(place, INFLIGHT), ARGV[at]) ~= 1
    elseif name == 'ack' then
      acknowledge(place, at)
    else
      is_settled = move(name, place, at)
    end
    if not is_settled then failed[#failed + 1] = index end
    at = at + size_of(name, at)
  end
end

-- Claims from one list of a queue, a chunk at a time.
local function claim_from(place, list, memory)
  while want > 0 do
    local payloads = try('LRANGE', list, 0, math.min(want, CHUNK) - 1)
    if not payloads or #payloads == 0 then return end
    local pairs_ = {}
    for i, payload in ipairs(payloads) do
      pairs_[2 * i - 1], pairs_[2 * i] = next_number + i - 1, payload
    end
    local is_many = #payloads >= MANY
    if is_many then pairs_[#pairs_ + 1], pairs_[#pairs_ + 2] = LONG_FIELD, '' end
    if not try('HSET', key(place, INFLIGHT), unpack(pairs_)) then return end
    if is_many then redis.call('HDEL', key(place, INFLIGHT), LONG_FIELD) end
    if not try('LTRIM', list, #payloads, -1) then -- forbidden, say: then nothing is claimed
      local numbers = {}
      for i = 1, #payloads do numbers[i] = next_number + i - 1 end
      redis.call('HDEL', key(place, INFLIGHT), unpack(numbers))
      return
    end
    give(place, next_number, payloads)
    memory[#memory + 1] = place .. ':' .. next_number .. ':' .. #payloads
    want, next_number = want - #payloads, next_number + #payloads
  end
end

local function execute()
  settle()
  local memory = {}
  local place = 0
  while want > 0 and key(place, QUEUE) do
    claim_from(place, key(place, HEAD), memory)
    claim_from(place, key(place, QUEUE), memory)
    place = place + 1
  end
  if #memory > 0 then
    local given = table.concat(memory, ' ')
    redis.call('HSET', KEYS[1], supervisor_id, number .. ' ' .. token .. ' ' .. given)
  end
end

local function answer_again()
  settle()
  for place, first, n in string.gmatch(given, '(%d+):(%d+):(%d+)') do
    for start = 0, n - 1, CHUNK do
      local numbers = {}
      for i = start, math.min(start + CHUNK, n) - 1 do numbers[#numbers + 1] = first + i end
      local payloads = try('HMGET', key(place, INFLIGHT), unpack(numbers)) or {}
      -- What is not there any more was taken from us by hand: claimed is what is left.
      for i, payload in ipairs(payloads) do
        if payload then give(place, numbers[i], {payload}) end
      end
    end
  end
end

if is_repeated then
  token = last_token
  answer_again()
else
  local now = redis.call('TIME')
  token = string.format('%d%06d', now[1], now[2])
  local reply = redis.pcall('HSET', KEYS[1], supervisor_id, number .. ' ' .. token)
  if type(reply) == 'table' then
    -- Out of memory, say. After a write that frees memory, here of nothing, the server lets the
    -- script write to its end, and so lets acks make room.
    redis.call('HDEL', KEYS[1], '')
    redis.call('HSET', KEYS[1], supervisor_id, number .. ' ' .. token)
  end
  local is_executed, err = pcall(execute)
  if not is_executed then -- not half a turn: the supervisor registers anew, and adopts what it has
    redis.call('HDEL', KEYS[1], supervisor_id)
    return redis.error_reply(type(err) == 'table' and err.err or tostring(err))
  end
end

give(-1, 0, errors)
local head = {token, #failed}
for _, index in ipairs(failed) do head[#head + 1] = index end
texts[1] = table.concat(head, ' ') .. ' ' .. table.concat(groups, ' ') .. '\n'
return table.concat(texts) -- made once: the server hashes each string that a script makes
