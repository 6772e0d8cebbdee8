-- Moves delayed payloads that are due to the front of their queues, the one due first foremost.
-- KEYS     delayed (zset), queue (list), …    pairs
-- ARGV[1]  how many payloads at most, over all queues
-- Returns lines: how many were moved, seconds until the next is due (inf if none waits), and
-- errors. A key of a wrong type is an error, and what was to be moved stays where it was: the other
-- queues go on.
local now = redis.call('TIME')
now = now[1] + now[2] / 1e6
local left, moved, next_due, errors = tonumber(ARGV[1]), 0, nil, {}

local function promote(delayed, queue)
  -- A write that frees memory comes first, here of nothing: after it, a server that is out of
  -- memory lets the script write to its end. Otherwise delayed payloads could fill a server for
  -- good.
  redis.call('ZREMRANGEBYRANK', delayed, 1, 0)
  local latest = string.format('%.6f', now)
  local due = redis.call('ZRANGEBYSCORE', delayed, '-inf', latest, 'LIMIT', 0, left)
  if #due > 0 then
    local reversed = {}
    for j = #due, 1, -1 do reversed[#reversed + 1] = due[j] end
    -- First, since it may fail: nothing is removed that was not pushed.
    redis.call('LPUSH', queue, unpack(reversed))
    redis.call('ZREM', delayed, unpack(due))
    moved, left = moved + #due, left - #due
  end
  local first = redis.call('ZRANGE', delayed, 0, 0, 'WITHSCORES')
  if first[2] then next_due = math.min(next_due or math.huge, tonumber(first[2])) end
end

for i = 1, #KEYS, 2 do
  local is_done, err = pcall(promote, KEYS[i], KEYS[i + 1])
  if not is_done then
    local text = type(err) == 'table' and err.err or tostring(err)
    text = text:match('%u%u+ .*') or text -- Redis 6 says first where it was
    if text:sub(1, 9) ~= 'WRONGTYPE' then return redis.error_reply(text) end
    errors[#errors + 1] = KEYS[i] .. ': ' .. text
  end
end
local wait = next_due and string.format('%.6f', math.max(next_due - now, 0)) or 'inf'
return table.concat({moved, wait, unpack(errors)}, '\n')
