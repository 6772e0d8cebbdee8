-- Moves delayed payloads that are due to the front of their queues, the one due first foremost.
-- KEYS     delayed (zset), queue (list), …    pairs
-- ARGV[1]  how many payloads at most, over all queues
-- Returns {how many were moved, seconds until the next is due as a string, or '' if none waits}.
local now = redis.call('TIME')
now = now[1] + now[2] / 1e6
local left, next_due = tonumber(ARGV[1]), nil
local moved = 0
for i = 1, #KEYS, 2 do
  local delayed, queue = KEYS[i], KEYS[i + 1]
  local due = redis.call('ZRANGEBYSCORE', delayed, '-inf', string.format('%.6f', now), 'LIMIT', 0, left)
  if #due > 0 then
    redis.call('ZREM', delayed, unpack(due))
    local reversed = {}
    for j = #due, 1, -1 do reversed[#reversed + 1] = due[j] end
    redis.call('LPUSH', queue, unpack(reversed))
    moved, left = moved + #due, left - #due
  end
  local first = redis.call('ZRANGE', delayed, 0, 0, 'WITHSCORES')
  if first[2] and (not next_due or tonumber(first[2]) < next_due) then next_due = tonumber(first[2]) end
end
return {moved, next_due and string.format('%.6f', math.max(next_due - now, 0)) or ''}
