-- One turn of a dispatcher: settles what its workers have finished, then claims what they want next.
-- A turn happens at most once: it carries the number of the turn before it and is refused if that is not the last one.
-- KEYS[1]  hash   worker id -> number of its last turn
-- KEYS[2…]        lanes (list), queues (list), delayed (zset), dead letters (list), stats (hash), named by index in ARGV
-- ARGV[1]  worker id    ARGV[2]  number of the turn before, or '' for an orphan, whose acks need no fence
-- ARGV[3]  number of this turn, then any number of operations:
--   done      lane stats n payload*n
--   first     lane stats n payload                      as done, for the n at the head of a lane; names only the last
--   requeue   lane queue n payload*n                    back to the front, the first one foremost
--   redeliver lane queue stats payload new              back to the front, changed
--   retry     lane queue stats payload new              to the end, changed
--   delay     lane delayed stats payload new seconds    due in that time
--   dead      lane dead stats payload letter cap        cap: how many letters are kept
--   claim     n want (queue lane)*n                     up to want payloads, in the order of the queues
-- Returns nil where refused, else one string, which costs a client much less than a list: numbers up to a newline, for
-- each lane its index in KEYS, a count and so many lengths, then payloads of these lengths. What stands under index 0
-- are errors. A key of a wrong type is one, and what was to be pushed there stays in its lane: the rest goes on.
local worker_id, expected, number = ARGV[1], ARGV[2], ARGV[3]
if expected ~= '' and redis.call('HGET', KEYS[1], worker_id) ~= expected then return false end
-- A write that frees memory comes first: after it, a server that is out of memory lets the script write to its end,
-- and so lets acks make room.
redis.call('HDEL', KEYS[1], '')
if expected ~= '' then redis.call('HSET', KEYS[1], worker_id, number) end

local numbers, texts, errors = {}, {''}, {} -- the first text is for the numbers
local position = 4
local function take()
  position = position + 1
  return ARGV[position - 1]
end
local function key() return KEYS[tonumber(take())] end

local function report(index, payloads)
  numbers[#numbers + 1] = index
  numbers[#numbers + 1] = #payloads
  for _, payload in ipairs(payloads) do
    numbers[#numbers + 1] = #payload
    texts[#texts + 1] = payload
  end
end

-- Runs a command, and returns its reply; of an error it takes note, and returns nil.
local function try(command, name, ...)
  local result = redis.pcall(command, name, ...)
  if type(result) == 'table' and result.err then
    errors[#errors + 1] = name .. ': ' .. result.err
    return nil
  end
  return result
end
local function count(stats, field, n) if n > 0 then try('HINCRBY', stats, field, n) end end
local function release(lane, payload, from) return try('LREM', lane, from, payload) == 1 end

-- Pushes only what was still in its lane, so that what was rescued meanwhile is not doubled.
local function move(lane, payload, from, ...)
  if not release(lane, payload, from) then return false end
  if try(...) then return true end
  redis.call('RPUSH', lane, payload)
  return false
end
local function replace(command, field)
  return function()
    local lane, target, stats, payload, new = key(), key(), key(), take(), take()
    if move(lane, payload, 1, command, target, new) then count(stats, field, 1) end
  end
end

local operations = {
  done = function()
    local lane, stats, n = key(), key(), tonumber(take())
    -- Mostly these are the first in their lane, in this order: then one command takes them all.
    local first, removed = try('LPOP', lane, n) or {}, 0
    while first[removed + 1] and first[removed + 1] == ARGV[position + removed] do removed = removed + 1 end
    for i = #first, removed + 1, -1 do redis.call('LPUSH', lane, first[i]) end
    for i = position + removed, position + n - 1 do
      if release(lane, ARGV[i], 1) then removed = removed + 1 end
    end
    position = position + n
    count(stats, 'done', removed)
  end,
  first = function()
    local lane, stats, n, payload = key(), key(), tonumber(take()), take()
    if try('LINDEX', lane, n - 1) == payload then
      redis.call('LTRIM', lane, n, -1)
      count(stats, 'done', n)
    else -- A bug: it will be found as a stray, and run twice, rather than that something is lost.
      errors[#errors + 1] = lane .. ': does not begin with what is to be acked'
    end
  end,
  requeue = function()
    local lane, queue, n = key(), key(), tonumber(take())
    for i = position + n - 1, position, -1 do move(lane, ARGV[i], -1, 'LPUSH', queue, ARGV[i]) end
    position = position + n
  end,
  redeliver = replace('LPUSH', 'redelivered'),
  retry = replace('RPUSH', 'retried'),
  delay = function()
    local lane, delayed, stats, payload, new, seconds = key(), key(), key(), take(), take(), take()
    local now = redis.call('TIME')
    local due = string.format('%.6f', now[1] + now[2] / 1e6 + seconds)
    if move(lane, payload, 1, 'ZADD', delayed, due, new) then count(stats, 'retried', 1) end
  end,
  dead = function()
    local lane, dead, stats, payload, letter, cap = key(), key(), key(), take(), take(), tonumber(take())
    if cap == 0 then
      if release(lane, payload, 1) then count(stats, 'dead', 1) end
    elseif move(lane, payload, 1, 'LPUSH', dead, letter) then
      redis.call('LTRIM', dead, 0, cap - 1)
      count(stats, 'dead', 1)
    end
  end,
  claim = function()
    local n, want = tonumber(take()), tonumber(take())
    for _ = 1, n do
      local queue, lane = key(), tonumber(take())
      local payloads = want > 0 and try('LPOP', queue, want)
      if payloads and #payloads > 0 then
        if try('RPUSH', KEYS[lane], unpack(payloads)) then
          want = want - #payloads
          report(lane, payloads)
        else
          for i = #payloads, 1, -1 do redis.call('LPUSH', queue, payloads[i]) end
        end
      end
    end
  end,
}
while position <= #ARGV do operations[take()]() end
report(0, errors)
texts[1] = table.concat(numbers, ' ') .. '\n'
return table.concat(texts) -- made once: the server hashes each string that a script makes
